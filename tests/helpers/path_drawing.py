"""Draws stored paths and saves how often this process evaluated the teacher. `test_teacher_paths.py` runs it on several processes."""

import sys

from diffusers_adm.training import train_consistency
from diffusers_adm.training.consistency import Teacher
from diffusers_adm.training.setup import load_training_images, set_up_accelerator
from diffusers_adm.training.teacher_paths import stored_paths


if __name__ == "__main__":
    options = train_consistency.parse_args(sys.argv[1:])
    accelerator = set_up_accelerator(options)
    images, held_out = load_training_images(options)
    teacher = Teacher(options, images, accelerator)
    sizes = []
    teacher.pipeline.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    paths, _ = stored_paths(options, images, held_out, teacher, accelerator)
    file = options.output.output_dir / f"process-{accelerator.process_index}.txt"
    file.write_text(f"{sum(sizes)} {len(paths)}")
    accelerator.end_training()  # ends the group of processes, which could abort the last one otherwise
