"""Buttons that run and stop a function of the page, and messages about its errors."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import gradio as gr
from gradio.components import Component


logger = logging.getLogger(__name__)

# Number of runs of all users and tabs that sample at the same time. Other runs wait in the queue.
SAMPLING = {"concurrency_id": "sampling", "concurrency_limit": 2}


def reporting_errors(function: Callable[..., Iterator], inputs: Sequence[Component] = ()) -> Callable[..., Iterator]:
    """
    Wraps a generator function so that its errors are shown in the page as one sentence. A fault of the program is logged with its
    traceback, which is not shown to the user.

    Args:
        function: Generator function. Each of its results is shown when it is yielded.
        inputs: Controls whose values are the arguments of the function. Those for numbers must not be empty.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        for control, value in zip(inputs, args):
            if isinstance(control, gr.Number) and value is None:
                raise gr.Error(f"{control.label} is empty. Enter a whole number.", print_exception=False)
        try:
            yield from function(*args, **kwargs)
        except gr.Error:
            raise
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:
            logger.exception("A run of the page failed.")
            raise gr.Error("This run failed. Details are in the server's log.", print_exception=False) from error

    return run


class RunButtons:
    """
    Button that runs a function, and button that stops it.

    Args:
        label: Text of the button that runs.
    """

    def __init__(self, label: str):
        with gr.Row():
            self.run = gr.Button(label, variant="primary")
            self.stop = gr.Button("Stop", variant="secondary")

    def start(
        self,
        function: Callable[..., Iterator],
        inputs: list[Component],
        outputs: list[Component],
        api_name: str,
        also: Sequence[Callable] = (),
    ) -> None:
        """
        Connects the buttons.

        Args:
            function: Generator function of the values of `inputs`. It yields values of `outputs`. Its parameters are named for
                clients of the API.
            inputs: Controls whose values are the arguments of the function.
            outputs: Components that show the results of the function.
            api_name: Name for clients of the API.
            also: Other events that run the function, such as `slider.release`.
        """
        run = reporting_errors(function, inputs)
        running = [self.run.click(run, inputs, outputs, api_name=api_name, **SAMPLING)]
        running += [listen(run, inputs, outputs, api_visibility="private", **SAMPLING) for listen in also]
        status = [output for output in outputs if isinstance(output, gr.Markdown)]
        stopped = self.stop.click(None, cancels=running, queue=False, api_visibility="private")
        if status:  # set after the run is cancelled, so that a late message of the run cannot replace it
            stopped.then(lambda: "Stopped.", None, status, queue=False, api_visibility="private")
