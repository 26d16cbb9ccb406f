#!/usr/bin/env bash
# pytest >= 9.1 adds its log handler to loggers that do not propagate. "torch.__trace" of PyTorch is one, always at DEBUG, and is
# thought of as switched off while it has no handler: with one, each torch.compile prints its graphs, guards and metrics as JSON
# for that handler, and a failing test shows these records as "Captured log call".
#
# Seen 2026-11-29 with torch 2.13.0 (CPU), Python 3.11, records captured while one function of two operations compiles:
#   pytest 9.0.2: 0          pytest 9.1.0: 34          pytest 9.2.0: 34
#   pytest 9.2.0: 1, after logging.getLogger("torch.__trace").propagate = True in a conftest.py
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/test_records.py" <<'PYTHON'
import torch


def test_records(caplog, capsys):
    torch.compile(lambda tensor: torch.relu(tensor) + 1, backend="eager")(torch.randn(3))
    with capsys.disabled():
        print("records", sum(record.name == "torch.__trace" for record in caplog.records))
PYTHON
records() {
    "$folder/venv/bin/pip" install -q "pytest==$1" 2>/dev/null
    "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider "$folder/test_records.py" | sed -n 's/^records //p'
}
old=$(records 9.0.2) first=$(records 9.1.0) new=$(records 9.2.0)
echo 'import logging, torch; logging.getLogger("torch.__trace").propagate = True' >"$folder/conftest.py"
mended=$(records 9.2.0)
echo "records: pytest 9.0.2 $old, 9.1.0 $first, 9.2.0 $new, 9.2.0 with the conftest.py $mended"
[ "$old" = 0 ] && [ "$first" -gt 20 ] && [ "$new" -gt 20 ] && [ "$mended" = 1 ]
