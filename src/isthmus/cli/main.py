"""The command ``isthmus``.

Commands are registered by the names of their functions and imported only when one is called, so
that ``isthmus --help`` answers at once.

Exit codes: 0 done, 2 an error that the user can mend (one line on standard error), 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownCommandError

from isthmus import __version__
from isthmus.cli.output import print_error
from isthmus.errors import IsthmusError, UnknownNameError

app = App(
    name="isthmus",
    help="Encoder-decoder systems on one grammar: the same output, sooner.",
    version=__version__,
    help_format="plaintext",
)
app.command(
    "isthmus.cli.generate:generate",
    name="generate",
    help="Write text with a model, faster than plain decoding and with the same output.",
)
app.command(
    "isthmus.cli.serve:serve",
    name="serve",
    help="Serve a model over HTTP, with the interface that OpenAI's clients speak.",
)
app.command(
    "isthmus.cli.strategies:strategies",
    name="strategies",
    help="List the decoding strategies, their settings, and whether drafts go with them.",
)
app.command(
    "isthmus.cli.train:train",
    name="train",
    help="Train a system on your data, or a drafter for your model.",
)
app.command(
    "isthmus.cli.run:run",
    name="run",
    help="Run a trained system: a text, a sound or a picture in, what it makes of it out.",
)
app.command(
    "isthmus.cli.explain:explain",
    name="explain",
    help="Look into a model with a lens: what it does on an input, checked and drawn.",
)
app.command(
    "isthmus.cli.shrink:shrink",
    name="shrink",
    help="Make a trained model smaller or sparser: its loss, size and speed before and after.",
)
app.command(
    "isthmus.cli.codec:encode",
    name="encode",
    help="Make a file of sound or a picture small: an .ist file.",
)
app.command(
    "isthmus.cli.codec:decode", name="decode", help="Turn an .ist file into sound or a picture."
)
app.command(
    "isthmus.cli.codec:inspect", name="inspect", help="Say what is in an .ist file, and check it."
)
app.command(
    "isthmus.cli.train:export",
    name="export",
    help="Write a trained drafter in a format that a serving engine loads.",
)
app.command(
    "isthmus.cli.systems:systems", name="systems", help="List the systems and what became of each."
)
app.command(
    "isthmus.cli.systems:show", name="show", help="Show one system: paper, settings, last claim."
)
app.command(
    "isthmus.cli.claim:claim", name="claim", help="Measure again what the papers of systems claim."
)
app.command("isthmus.cli.retrieval:embed", name="embed", help="Make vectors of texts.")
app.command(
    "isthmus.cli.retrieval:index",
    name="index",
    help="Make documents searchable, by words and, with a model, by meaning.",
)
app.command(
    "isthmus.cli.retrieval:search", name="search", help="Find documents that answer a query."
)
bench = App(name="bench", help="Compare methods side by side, interleaved in one run.")
bench.command(
    "isthmus.cli.bench:decode",
    name="decode",
    help="Decoding: isthmus against transformers' own generation, same model and prompts.",
)
bench.command(
    "isthmus.cli.codec:bench",
    name="codec",
    help="Codecs on your own pictures or sounds: rate, distortion and time.",
)
bench.command(
    "isthmus.cli.bench:family",
    name="family",
    help="The speculative family: one target, the same prompts, greedy and sampled.",
)
bench.command(
    "isthmus.cli.bench:growth",
    name="growth",
    help="How the cost of a token grows with the model, what is cached, and the batch.",
)
bench.command(
    "isthmus.cli.bench:guide",
    name="guide",
    help="Which drafter fits a model and its texts, measured before it is advised.",
)
bench.command(
    "isthmus.cli.bench:peers",
    name="peers",
    help="Other engines to compare with: which are installed, and installing one.",
)
bench.command(
    "isthmus.cli.bench:roofline",
    name="roofline",
    help="Forwards of a model beside the least time that this machine allows.",
)
bench.command(
    "isthmus.cli.bench_serve:serve",
    name="serve",
    help="A server under load, beside that of transformers.",
)
bench.command(
    "isthmus.cli.bench_train:train",
    name="train",
    help="Training: the loop of isthmus beside the Trainer of transformers.",
)
bench.command(
    "isthmus.cli.bench_translate:translate",
    name="translate",
    help="Translation engines on the same model: speed at equal output.",
)
app.command(bench)
law = App(name="law", help="Scaling laws: how a loss falls with sizes.")
law.command(
    "isthmus.cli.law:fit",
    name="fit",
    help="Fit a law to a table of runs, test it on the largest, and predict larger ones.",
)
app.command(law)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after ``isthmus``; those of the process if None.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    app.suppress_keyboard_interrupt = False
    try:
        result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        # A closed pipe must show itself here, not in the interpreter's last flush.
        sys.stdout.flush()
    except UnknownCommandError as error:
        # Its own message would import every command to look for a near name.
        groups = {"bench": bench, "law": law}
        within = groups.get((error.command_chain or ("",))[0], app)
        known = [name for name in within if not name.startswith("-")]
        print_error(UnknownNameError("command", (error.unused_tokens or [""])[0], known))
        return 2
    except CycloptsError as error:
        print_error(f"{error} (see: isthmus --help)")
        return 2
    except IsthmusError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough; the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
