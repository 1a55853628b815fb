"""Compilation of the two models.

The eager backend traces and guards as any other does, without the wait for a C++ compiler.
"""

import pytest
import torch
from model_calls import LABELS, TIMESTEPS, every_model, predict, run, tiny_model
from tiny_models import images, tiny_classifier

from diffusers_adm.guidance import classifier_gradient


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield torch._dynamo.config
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_compiles_without_graph_break_or_recompilation(kind, fresh_dynamo):
    model = tiny_model(kind)
    expected = predict(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with fresh_dynamo.patch(error_on_recompile=True), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(compiled, images()), expected)
        torch.testing.assert_close(
            run(compiled, images(seed=7), TIMESTEPS - 5, LABELS - 1),
            predict(model, images(seed=7), timestep=TIMESTEPS - 5, labels=LABELS - 1),
        )


@pytest.mark.parametrize("kind", ["unet", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_compiles_once_for_all_sizes(kind, fresh_dynamo):
    model = tiny_model(kind)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with fresh_dynamo.patch(error_on_recompile=True), torch.no_grad():
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            for height, width in ((8, 8), (12, 16), (16, 12)):
                sample = images(height=height, width=width)
                torch.testing.assert_close(run(compiled, sample), predict(model, sample))


@pytest.mark.parametrize("kind", ["unet", "attention"])
@pytest.mark.parametrize("number", [int, float])
def test_compiles_no_graph_per_number_that_is_the_timestep(kind, number, fresh_dynamo):
    model, graphs = tiny_model(kind), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for timestep in map(number, (998, 17, 3, 500, 0, 44, 7, 8, 9, 1)):
            torch.testing.assert_close(run(compiled, images(), timestep), predict(model, timestep=timestep))
    assert len(graphs) <= 3


WIDTHS = {
    # The released models' multipliers, 1 / 32 as wide; attention at the same levels.
    "64x64": {"sample_size": 64, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (32, 16, 8)},
    "256x256": {"sample_size": 64, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 4, 2)},
    "512x512": {"sample_size": 64, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (4, 2, 1)},
}


@pytest.mark.parametrize("kind", ["unet", "attention"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_regional_compilation_stays_within_the_recompile_limit(kind, widths, fresh_dynamo):
    model = tiny_model(kind, layers_per_block=2, **WIDTHS[widths])
    sample = images(height=64, width=64)
    expected = predict(model, sample)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(predict(model, sample), expected, rtol=1e-4, atol=1e-4)
    # torch before 2.7 has the limit under its earlier name.
    assert 0 < len(compiled) <= getattr(fresh_dynamo, "recompile_limit", fresh_dynamo.cache_size_limit)
    first = len(compiled)
    predict(model, sample)
    assert len(compiled) == first


@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_model_can_be_exported(kind):
    model = tiny_model(kind)
    arguments = (images(), TIMESTEPS) + ((LABELS,) if kind == "unet" else ())
    dynamic = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})[: len(arguments)]
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=dynamic, strict=False)
    sample, timestep, labels = images(3), torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])
    output = program.module()(*(sample, timestep, labels)[: len(arguments)])
    torch.testing.assert_close(output[0], predict(model, sample, timestep=timestep, labels=labels))


@pytest.mark.slow
@every_model
def test_compiles_with_the_default_backend(kind, fresh_dynamo):
    model = tiny_model(kind)
    expected = predict(model)
    with fresh_dynamo.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(predict(compiled._orig_mod), expected)
            with torch.no_grad():
                torch.testing.assert_close(run(compiled, images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_regional_compilation_with_the_default_backend(kind, fresh_dynamo):
    model = tiny_model(kind)
    expected = predict(model)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute"
)  # torch reads it while it traces, and hides the warning itself
def test_guidance_through_a_compiled_classifier(fresh_dynamo):
    classifier = tiny_classifier()
    expected = classifier_gradient(classifier, images(), TIMESTEPS, LABELS)
    classifier.compile(fullgraph=True)
    gradient = classifier_gradient(classifier, images(), TIMESTEPS, LABELS)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
