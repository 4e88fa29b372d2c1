#!/usr/bin/env bash
# Set up .venv with all that the tests need, and run them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/venv.sh
venv_with tests/requirements.txt
# Workers and BLAS would fight for the same cores.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" "$@"
