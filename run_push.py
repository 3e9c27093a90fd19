"""Upload a complete checkpoint to the Hub: model or adapter, processor, code, chat template and card.

    python run_push.py outputs/jnana/sft/merged my-name/my-model
    python run_push.py outputs/jnana/align my-name/my-projector --private
    python run_push.py outputs/jnana/sft/merged my-name/my-model --space my-name/my-chat   # and a page to try it on
    python run_push.py my-name/my-model --space my-name/my-chat                            # of a model that is there

Log in first (`hf auth login`). Intermediate checkpoints, samples, lists of bad rows and the pickled arguments are not
uploaded. A file that names a directory of this machine raises an error, and so does an adapter whose base is not on
the Hub. The training scripts do the same at their end with `push_to_hub: true` and `hub_model_id`. A Space is four
files: README.md, app.py, requirements.txt and the wheel of this package (docs/app.md).
"""

import argparse
import sys
import tempfile

from jnana.processing.data.paths import is_hub_id
from jnana.training.console import log_to_stdout
from jnana.training.sharing import push_folder
from jnana.training.space import check_space, upload_space, write_space


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the output_dir of a finished run, or its subdirectory `merged`")
    parser.add_argument("repo_id", nargs="?", help="NAME/MODEL on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--space", metavar="NAME/SPACE", help="also make a Space that shows the model")
    parser.add_argument("--wheel", help="of this package, for the Space; default: built from this clone")
    options = parser.parse_args(argv)
    log_to_stdout()
    model_id = options.repo_id
    if model_id is None:  # a model that is on the Hub
        if options.space is None:
            raise ValueError(f"repo_id is not set; give where {options.folder!r} is pushed to: NAME/MODEL")
        model_id = options.folder
    if options.space is not None:
        for name, value in (("repo_id", model_id), ("--space", options.space)):
            if not is_hub_id(value) or value.count("/") != 1:
                raise ValueError(f"{name} {value!r} is not an id on the Hub; a Space needs NAME/MODEL and NAME/SPACE")
        if options.revision is not None:
            raise ValueError("--revision can't be combined with --space, whose page shows the main branch; push twice")
    elif options.wheel is not None:
        raise ValueError("--wheel is for a Space; give --space NAME/SPACE too")
    with tempfile.TemporaryDirectory(prefix="jnana-space-") as folder:
        if options.space is not None:  # what can fail for the Space fails before the model is uploaded
            names = write_space(folder, model_id, options.space.split("/")[-1], options.wheel)
            check_space(options.space, model_id, pushed=options.repo_id is not None, private=options.private)
        if options.repo_id is not None:
            model_id = push_folder(options.folder, options.repo_id, private=options.private, revision=options.revision)
        if options.space is not None:
            upload_space(folder, names, options.space, model_id, private=options.private)


if __name__ == "__main__":
    main(sys.argv[1:])
