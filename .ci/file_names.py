"""Fails if a tracked file has a name that some operating system does not allow. `make quality` runs it.

python .ci/file_names.py
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


# Windows forbids these characters, names of devices, and a space or a dot at the end of a name.
FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]')
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)
MAX_LENGTH = 180  # Windows allows 260 characters of a whole path, the directory of the clone included


def problems(paths: list[str]) -> list[str]:
    """One text for each path that some operating system cannot hold."""
    found = []
    same = defaultdict(list)
    for path in paths:
        same[path.lower()].append(path)
        for name in path.split("/"):
            if FORBIDDEN.search(name):
                found.append(f"{path!r}: a character that Windows forbids")
            elif DEVICES.match(name):
                found.append(f"{path!r}: {name!r} is a device on Windows")
            elif name.endswith((" ", ".")) or name.startswith(" "):
                found.append(f"{path!r}: a name that starts or ends with a space, or ends with a dot")
            elif not name.isascii():
                found.append(f"{path!r}: a character outside ASCII, which file systems encode in different forms")
        if len(path) > MAX_LENGTH:
            found.append(f"{path!r}: longer than {MAX_LENGTH} characters")
    found += [
        f"{names}: the same name where upper and lower case are one" for names in same.values() if len(names) > 1
    ]
    return found


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=False)
    if listed.returncode:
        if not Path(".git").exists():
            print("Not a git checkout: file names are not checked.")
            return 0
        print(f"git ls-files failed: {listed.stderr.decode(errors='replace').strip()}")
        return 1
    found = problems([path for path in listed.stdout.decode("utf-8", "surrogateescape").split("\0") if path])
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
