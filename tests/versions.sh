#!/usr/bin/env bash
# The tests with the lowest, then the highest torch, transformers and numpy that requirements.txt allows, each in a fresh
# environment. By hand, before a limit is moved: it takes gigabytes and half an hour. CI runs one version only.
#   bash tests/versions.sh                   # the everyday tests
#   bash tests/versions.sh tests/layers      # arguments of pytest
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
for versions in lowest highest; do
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    touch "$environment/limits.txt"  # pip takes the highest by itself
    if [ $versions = lowest ]; then
        sed -nE 's/^(torch|transformers|numpy)>=([0-9.]+),.*/\1==\2.*/p' requirements.txt > "$environment/limits.txt"
    fi
    python3 -m venv "$environment" \
        && "$environment/bin/pip" install -q -r requirements-dev.txt -c "$environment/limits.txt" \
        && "$environment/bin/python" -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)" \
        && "$environment/bin/python" -m pytest "$@" || { echo "the $versions versions failed" >&2; failed=1; }
    rm -rf "$environment"
done
exit $failed
