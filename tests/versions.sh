#!/usr/bin/env bash
# The tests with the lowest, then the highest versions that requirements.txt allows, each in a fresh environment:
# the lowest torch, transformers and numpy; the highest of everything. By hand, before a limit is moved, because
# it needs gigabytes and half an hour.
#   bash tests/versions.sh                   # the everyday tests
#   bash tests/versions.sh tests/layers      # arguments of pytest
set -uo pipefail
cd "$(dirname "$0")/.."
packages="torch|transformers|numpy"
failed=0
for versions in lowest highest; do
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    limits="$environment/limits.txt"
    touch "$limits"  # empty: pip takes the highest versions
    if [ $versions = lowest ]; then
        sed -nE "s/^($packages)>=([0-9.]+),.*/\1==\2.*/p" requirements.txt > "$limits"
    fi
    python3 -m venv "$environment" \
        && "$environment/bin/pip" install -q -r requirements-dev.txt -c "$limits" \
        && "$environment/bin/pip" list | grep -E "^($packages) " \
        && "$environment/bin/python" -m pytest "$@" || { echo "failed: the $versions versions" >&2; failed=1; }
    rm -rf "$environment"
done
exit $failed
