"""Upload a complete checkpoint to the Hub: model or adapter, processor, code, chat template and card.

    python run_push.py outputs/jnana/sft/merged my-name/my-model
    python run_push.py outputs/jnana/align my-name/my-projector --private

Log in first (`hf auth login`). Intermediate checkpoints, samples, lists of bad rows and the pickled arguments are not
uploaded. A file that names a directory of this machine raises an error, and so does an adapter whose base is not on
the Hub. The training scripts do the same at their end with `push_to_hub: true` and `hub_model_id`.
"""

import argparse
import sys

from jnana.training.console import log_to_stdout
from jnana.training.sharing import push_folder


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the output_dir of a finished run, or its subdirectory `merged`")
    parser.add_argument("repo_id", help="NAME/MODEL on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to push to")
    options = parser.parse_args(argv)
    log_to_stdout()
    push_folder(options.folder, options.repo_id, private=options.private, revision=options.revision)


if __name__ == "__main__":
    main(sys.argv[1:])
