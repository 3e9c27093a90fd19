#!/usr/bin/env bash
# Rewrites constraints-newest.txt: the newest versions of all dependencies that pip installs together today, torch at the
# release of constraints.txt. Prints the versions that changed. Then run `make test-newest` and commit the file.
set -euo pipefail
cd "$(dirname "$0")/.."
file=constraints-newest.txt
torch=$(grep '^torch==' constraints.txt)
venv=$(mktemp -d)
new=$(mktemp)
trap 'rm -rf "$venv" "$new"' EXIT

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" -e ".[app,dev,clients]"
{
    grep '^#' "$file"
    # A CUDA build of torch brings its libraries along; they belong to the build, not to this list.
    "$venv/bin/python" -m pip freeze --exclude-editable | sed 's/+cpu$//' | grep -viE '^(nvidia-|cuda-|triton)'
} > "$new"
echo "Changes in $file (- before, + now):"
diff <(grep -v '^#' "$file") <(grep -v '^#' "$new") | sed -n 's/^< /- /p; s/^> /+ /p' || true
cp "$new" "$file"
