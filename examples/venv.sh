# Sourced by pipeline.sh and tests/run.sh: a virtual environment that follows a requirements file.

# venv_with REQUIREMENTS: make .venv in this folder if there is none, install what has changed.
venv_with() {
    local requirements=$1 stamp
    if [ ! -x .venv/bin/python ]; then
        echo "setting up .venv from $requirements" >&2
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or newer is needed; name one in PYTHON=..." >&2
            return 1
        }
        "${PYTHON:-python3}" -m venv .venv
    fi
    stamp=.venv/$(echo "$requirements" | tr / _).installed
    if ! cat requirements.txt "$requirements" | cmp -s - "$stamp"; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cat requirements.txt "$requirements" > "$stamp"
    fi
}
