#!/usr/bin/env bash
# MedSASS, from nothing to a result table. `bash run_all.sh help` says what it can do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
bash run_all.sh         set up, then the demo: draw images, pre-train by every method, score, print the table
bash run_all.sh test    set up, add the test-only packages, run the tests
bash run_all.sh help    this text

Set-up uses the active Python environment if it already satisfies requirements.txt; otherwise it makes .venv here
(or re-uses it) and installs into that. What is finished is skipped when a command is run again.
TEXT
}

# Print a command, run it, and stop at a failure with the command that failed.
run() {
    printf '\n$ %s\n' "$*"
    "$@" || { code=$?; printf 'failed with exit code %s: %s\n' "$code" "$*" >&2; exit "$code"; }
}

# Whether a Python has all that requirements.txt asks for, and can import it.
satisfied() {
    local plan
    plan=$("$1" -m pip install --dry-run --no-index -r requirements.txt 2>/dev/null) || return 1
    [[ $plan != *"Would install"* ]] && "$1" -c 'import torch, torchvision, timm, cv2, PIL, tqdm' 2>/dev/null
}

# Sets $PYTHON.
setup() {
    PYTHON=$(command -v python3 || command -v python) || { echo 'Python 3.10 or newer is needed' >&2; exit 1; }
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "Python 3.10 or newer is needed; $PYTHON is $("$PYTHON" -V)" >&2; exit 1; }
    if satisfied "$PYTHON"; then
        return
    fi
    [[ -x .venv/bin/python ]] || run "$PYTHON" -m venv .venv
    PYTHON=.venv/bin/python
    satisfied "$PYTHON" || run "$PYTHON" -m pip install --quiet -r requirements.txt
}

# score JSON FLAGS...: evaluate, unless the result is there.
score() {
    if [[ -f $1 ]]; then
        printf '\n%s is there: skipped\n' "$1"
    else
        run "$PYTHON" finetune_eval.py "${@:2}"
    fi
}

# demo_run BACKBONE NAME FLAGS...: pre-train on the demo and score; NAME is the run's folder.
demo_run() {
    run "$PYTHON" pretrain.py --dataset demo --backbone "$1" "${@:3}"
    score "results/demo/$1/$2/seed0/transfer.json" --run "runs/demo/$1/$2/seed0"
}

demo() {
    [[ -f data/demo/meta.json ]] || run "$PYTHON" prepare_data.py --dataset demo
    demo_run resnet50 medsass-e30 --epochs 30
    demo_run resnet50 medsass-encoder-e10 --train encoder --epochs 10
    demo_run vit_small medsass-e10 --epochs 10
    for method in byol simsiam dino; do
        demo_run resnet50 "$method-e3" --method "$method" --epochs 3
    done
    for method in dino mae simmim; do
        demo_run vit_small "$method-e3" --method "$method" --epochs 3
    done
    for backbone in resnet50 vit_small; do
        score "results/demo/$backbone/reference/seed0/reference.json" \
            --protocol reference --dataset demo --backbone "$backbone"
    done
    run "$PYTHON" finetune_eval.py --report
}

tests() {
    run "$PYTHON" -m pip install --quiet pytest segmentation-models-pytorch scikit-image scikit-learn lightly
    run "$PYTHON" -m pytest -q -o markers=bench -m 'not bench' test_smoke.py
}

case "${1:-demo}" in
    demo) setup; demo ;;
    test) setup; tests ;;
    help | -h | --help) help ;;
    *) printf 'unknown command: %s\n' "$1" >&2; help >&2; exit 2 ;;
esac
