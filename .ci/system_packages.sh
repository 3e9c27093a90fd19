#!/usr/bin/env bash
# System packages that some tests use; those tests are skipped, and say so, where they are missing.
#   chromium    drives the chat app
#   espeak-ng   speaks the questions that WhisperX has to hear
set -euo pipefail
packages=(chromium espeak-ng)

missing=()
for package in "${packages[@]}"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "Install ${missing[*]} with this system's package manager." >&2
    exit 1
fi
root=(); [ "$(id -u)" -eq 0 ] || root=(sudo)
"${root[@]}" apt-get update -qq
failed=()
for package in "${missing[@]}"; do  # one by one: Ubuntu has chromium as a snap only
    DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "$package" ||
        failed+=("$package")
done
[ ${#failed[@]} -eq 0 ] || { echo "Not installed: ${failed[*]}." >&2; exit 1; }
