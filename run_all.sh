#!/usr/bin/env bash
# MedSASS, from nothing to a result table. `bash run_all.sh help` says what it can do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
bash run_all.sh             set up; then main over the paper's data sets that are prepared, else the demo
bash run_all.sh demo        the demo: pre-training, few labels, results and masks on drawn pictures, in minutes
bash run_all.sh main        the paper's Tables 1, 2 and Figures 3, 4, 10: methods x backbones x seeds
bash run_all.sh ablations   Tables 3, 4, 5, 7, 8 and B.1: threshold, loss, epochs, batch size
bash run_all.sh classify    Table 9: linear probes
bash run_all.sh drone       Table 10
bash run_all.sh all         main, ablations, classify and drone
bash run_all.sh test        set up, add the test-only packages, run the tests
bash run_all.sh bench       set up, run the benchmarks against other libraries; results/bench.json

From the environment:
DATASETS   prepared data sets, e.g. "isic xray"; demo is drawn. Unset: those of the paper that are prepared
SEEDS      "0 1 2 3 4"; drone "0 1 2"               METHODS    "medsass byol simsiam dino mae simmim"
BACKBONES  "resnet50 vit_small"                     EPOCHS     50, of pre-training and of training on labels
PROTOCOLS  "transfer frozen finetune"; also semi, of whole U-Nets
LABELS     "0.01 0.1 1.0", for frozen, finetune, semi and supervised
SIZE       side of the demo's pictures; other data sets must have been prepared at it
SHARD      2/8: every eighth run, beginning with the second; machines or a SLURM array then share the work
JOBS       runs at a time on this machine: 1, the demo 2; the cores are shared between them
GPUS       "0 1 2 3": a run at a time on each of these devices, instead of JOBS
DRY_RUN    1: list every run, with what is made of it (RUN) below, and do nothing

What is finished is skipped, what was cut goes on where it stopped. Several of these may run at once: no run is
trained by two of them. A run that fails does not stop the others; it is listed at the end with its log, and the exit
code is 1. Set-up uses the active Python environment if it satisfies requirements.txt; otherwise it makes .venv here
(or re-uses it) and installs into that.
TEXT
}

# Whether a Python has all that requirements.txt asks for, and can import it.
satisfied() {
    local plan
    plan=$("$1" -m pip install --dry-run --no-index -r requirements.txt 2>/dev/null) || return 1
    [[ $plan != *"Would install"* ]] && "$1" -c 'import torch, torchvision, timm, cv2, PIL, tqdm' 2>/dev/null
}

# Sets $PYTHON.
setup() {
    [[ -z ${DRY_RUN:-} ]] || return 0
    PYTHON=$(command -v python3 || command -v python) || { echo 'Python 3.10 or newer is needed' >&2; exit 1; }
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "Python 3.10 or newer is needed; $PYTHON is $("$PYTHON" -V)" >&2; exit 1; }
    satisfied "$PYTHON" && return
    [[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
    PYTHON=.venv/bin/python                 # matplotlib draws the report's charts; nothing else needs it
    satisfied "$PYTHON" || "$PYTHON" -m pip install --quiet -r requirements.txt matplotlib
}

# ---------------------------------------------------------------------------------------------------------- the plan
# A line a network: the flags of pretrain.py (none where nothing is pre-trained), then, after each |, flags of
# finetune_eval.py for what is made of it.

# on_labels FLAGS...: an evaluation with each of $LABELS.
on_labels() {
    local labels
    for labels in $LABELS; do
        printf '|%s --labels %s%s' "$*" "$labels" "${EPOCHS:+ --epochs $EPOCHS}"
    done
}

# pretrained PROTOCOLS FLAGS...: pre-training, and its evaluations.
pretrained() {
    local protocols=$1 protocol flags
    shift
    flags=" $* "
    [[ $flags == *' --epochs '* ]] || flags+="${EPOCHS:+--epochs $EPOCHS }"
    flags=${flags/ --threshold otsu / } flags=${flags/ --loss focal_tversky / }     # a run once, if it is in two tables
    flags=${flags/ --epochs 50 / } flags=${flags/ --batch-size 16 / } flags=${flags# }
    printf '%s' "${flags% }"
    for protocol in $protocols; do
        case $protocol in
            transfer) printf '|--protocol transfer' ;;
            classify) printf '|--protocol classify%s' "${EPOCHS:+ --epochs $EPOCHS}" ;;
            semi) [[ $flags == *--method* || $flags == *encoder* ]] || on_labels --protocol semi ;;
            *) on_labels --protocol "$protocol" ;;
        esac
    done
    echo
}

# encoders PROTOCOLS BACKBONE FLAGS...: every method that trains an encoder on this backbone, MedSASS among them.
encoders() {
    local protocols=$1 backbone=$2 method
    shift 2
    for method in $METHODS; do
        case $method/$backbone in
            medsass/*) pretrained "$protocols" "$@" --train encoder ;;
            byol/vit_small | simsiam/vit_small | mae/resnet50 | simmim/resnet50) ;;
            *) pretrained "$protocols" "$@" --method "$method" ;;
        esac
    done
}

# plan_of PART DATASET SEED BACKBONE: its lines.
plan_of() {
    local on="--dataset $2 --backbone $4 --seed $3" value
    [[ $1 == classify ]] || echo "|$on --protocol reference"
    case $1 in
        main)
            for value in $LABELS; do LABELS=$value on_labels "$on --protocol supervised"; echo; done
            if [[ " $METHODS " == *' medsass '* ]]; then
                pretrained "$PROTOCOLS" "$on"
                pretrained "$PROTOCOLS" "$on --refine"
            fi
            encoders "$PROTOCOLS" "$4" "$on"
            ;;
        ablations)
            for value in 10 20 50 70; do pretrained transfer "$on --train encoder --epochs $value"; done
            for value in 8 16 32; do pretrained transfer "$on --train encoder --batch-size $value"; done
            [[ $4 == resnet50 ]] || return 0
            for value in adaptive_mean adaptive_gaussian ght otsu; do
                pretrained transfer "$on --threshold $value"
            done
            for value in tversky focal focal_tversky bce; do pretrained transfer "$on --loss $value"; done
            ;;
        classify | drone) encoders "${1/drone/transfer}" "$4" "$on" ;;
    esac
}

# plan PARTS...: the lines of parts of the benchmark, with the defaults of what the environment does not set; each run once, with all
# that is made of it; every N-th from the K-th on where SHARD is K/N.
plan() {
    local part dataset seed backbone papers
    local METHODS=${METHODS:-medsass byol simsiam dino mae simmim} LABELS=${LABELS:-0.01 0.1 1.0}
    local PROTOCOLS=${PROTOCOLS:-transfer frozen finetune}
    for part in "$@"; do
        papers='dm tissuenet isic xray'
        [[ $part != classify ]] || papers='isic xray'
        [[ $part != drone ]] || papers=drone
        for dataset in ${DATASETS:-$(prepared $papers)}; do
            [[ $part != drone || $dataset == drone ]] || continue
            for seed in ${SEEDS:-0 1 2 $([[ $part == drone ]] || echo 3 4)}; do
                for backbone in ${BACKBONES:-resnet50 vit_small}; do
                    [[ $part != drone || $backbone == resnet50 ]] || continue
                    plan_of "$part" "$dataset" "$seed" "$backbone"
                done
            done
        done
    done | awk -F'|' -v k="${SHARD%/*}" -v n="${SHARD#*/}" '
        { run = $1 == "" ? $0 : $1 }
        !(run in place) { place[run] = ++runs; line[runs] = run; if ($1 == "") next }
        $1 != "" { for (i = 2; i <= NF; i++) if (!seen[run, $i]++) line[place[run]] = line[place[run]] "|" $i }
        END { for (i = 1; i <= runs; i++) if (i % n == k % n) print line[i] }'
}

# prepared NAMES...: those of the names that are prepared; in a dry run, where none is, all of them.
prepared() {
    local name found=''
    for name in "$@"; do
        [[ ! -f data/$name/meta.json ]] || found+="$name "
    done
    [[ -n $found || -z ${DRY_RUN:-} ]] || found=$*
    echo "$found"
}

# -------------------------------------------------------------------------------------------------------- the driver

# once SCRIPT FLAGS...: run it, unless its log says that what it made is there; prints that, its last line.
once() {
    local words="$*" log code=0 made
    log=results/logs/${words//[^a-zA-Z0-9.+]/_}.log
    made=$(tail -n 1 "$log" 2>/dev/null || true)
    if [[ ! -f $made ]]; then
        echo "[$NUMBER] python $*" >&2
        "$PYTHON" "$@" >"$log.$$" 2>&1 || code=$?
        if [[ $code == 75 ]]; then          # another process is at it
            echo "$*" >>"$WORK/later"
            return 75
        fi
        mv "$log.$$" "$log"
        [[ $code == 0 ]] || { printf '  exit code %s: python %s\n    log: %s\n' "$code" "$*" "$log" >>"$WORK/failed"; return 1; }
        made=$(tail -n 1 "$log")
    fi
    echo "$made"
}

# job LINE: a line of the plan, with its number before it.
job() {
    local flags run='' parts gpus=(${GPUS:-})
    trap 'rm -f results/logs/*.log.$$' EXIT
    trap 'exit 143' TERM
    [[ -z ${GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT]}
    IFS='|' read -r -a parts <<<"$1"
    NUMBER=${parts[0]}
    if [[ -n ${parts[1]} ]]; then
        run=$(once pretrain.py ${parts[1]}) || return 0         # what builds on it is not tried
        run=${run%/*}
    fi
    for flags in "${parts[@]:2}"; do
        once finetune_eval.py ${run:+--run "$run"} $flags >/dev/null || true
    done
}

# drive JOBS: the plan on standard input, so many lines at a time; what another process is at is tried again until it is done.
drive() {
    local lines total
    lines=$(cat) total=$(grep -c . <<<"$lines" || true)
    export PYTHON WORK GPUS
    WORK=$(mktemp -d)
    mkdir -p results/logs
    awk '{ printf "%d/%d|%s%c", NR, total, $0, 0 }' total="$total" <<<"$lines" >"$WORK/plan"
    touch "$WORK/later"
    while [[ -f $WORK/later ]]; do
        rm "$WORK/later"
        set -m                              # a process group of its own, to be stopped as one
        xargs -0 -n 1 -P "$1" ${GPUS:+--process-slot-var=SLOT} "$BASH" run_all.sh job <"$WORK/plan" &
        group=$!
        set +m
        trap 'kill -- -$group; wait; rm -r "$WORK"; echo "stopped; the same command goes on" >&2; exit 130' INT TERM
        wait $group || true
        [[ ! -f $WORK/later ]] || sleep 5
    done
    trap - INT TERM
    [[ ! -f $WORK/failed ]] || { printf '\nfailed:\n' >&2; cat "$WORK/failed" >&2; rm -r "$WORK"; return 1; }
    rm -r "$WORK"
}

# ready DATASETS...: stop where one is not prepared, or not at $SIZE; the demo's pictures are drawn.
ready() {
    local name
    for name in "$@"; do
        if [[ $name == demo && ! -f data/demo/meta.json ]]; then
            "$PYTHON" prepare_data.py --dataset demo ${SIZE:+--size "$SIZE"} || [[ -f data/demo/meta.json ]]    # by another process
        fi
        [[ -f data/$name/meta.json ]] || { echo "data/$name is not prepared: see python prepare_data.py --help" >&2; exit 1; }
        [[ -z ${SIZE:-} ]] || grep -q "\"size\": $SIZE," "data/$name/meta.json" ||
            { echo "data/$name is not prepared at SIZE=$SIZE: prepare it again with --size $SIZE --overwrite" >&2; exit 1; }
    done
}

# benchmark: run what is missing of the plan on standard input, and write the report.
benchmark() {
    local code=0 gpus=(${GPUS:-}) jobs=${JOBS:-1}
    ((${#gpus[@]} == 0)) || jobs=${#gpus[@]}
    if [[ -n ${DRY_RUN:-} ]]; then
        awk -F'|' '{ if ($1 != "") print "python pretrain.py " $1
                     for (i = 2; i <= NF; i++) print ($1 == "" ? "" : "    ") "python finetune_eval.py " ($1 == "" ? "" : "--run RUN ") $i }'
        return
    fi
    if ((jobs > 1)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then      # cores are shared, not fought over
        OMP_NUM_THREADS=$("$PYTHON" -c "import os; print(max(1, os.cpu_count() // $jobs))")
        export OMP_NUM_THREADS
    fi
    drive "$jobs" || code=1
    ! ls results/*/*/*/*/*.json >/dev/null 2>&1 || "$PYTHON" finetune_eval.py --report || code=1
    return $code
}

# What Otsu's threshold draws, what MedSASS makes of it, and what six labels add.
demo() {
    local on='--dataset demo --backbone resnet50 --seed 0' few="--labels 0.1 --epochs ${EPOCHS:-10}" run
    local refined="$on --refine --epochs ${EPOCHS:-16}"
    [[ -n ${DRY_RUN:-} ]] || ready demo
    JOBS=${JOBS:-2} benchmark <<TEXT
$refined|--protocol transfer|--protocol semi $few|--protocol finetune $few
$on --epochs ${EPOCHS:-16}|--protocol transfer
|$on --protocol reference
|$on --protocol supervised $few
TEXT
    [[ -z ${DRY_RUN:-} ]] || return 0
    run=$(once pretrain.py $refined)
    "$PYTHON" - <<'TEXT'
import pathlib, numpy, PIL.Image
folder = pathlib.Path("predictions/pictures")
folder.mkdir(parents=True, exist_ok=True)
for k, image in enumerate(numpy.load("data/demo/test_images.npy")[:4]):
    PIL.Image.fromarray(image).save(folder / f"{k}.png")
TEXT
    "$PYTHON" finetune_eval.py --run "${run%/*}" --predict predictions/pictures --out predictions/masks --overlay --overwrite
    cat <<TEXT

The table is in results/README.md, its chart results/demo.png; ${run} shows image, Otsu, refined mask and
prediction; masks of pictures in a folder are in predictions/masks.
Next, your own images:
    python prepare_data.py --dataset folder --raw my_images && DATASETS=my_images SEEDS=0 bash run_all.sh
and the whole benchmark in miniature:
    DATASETS=demo EPOCHS=1 SEEDS="0 1" bash run_all.sh main
TEXT
}

# main, ablations, classify, drone
parts() {
    local lines
    [[ -n ${DRY_RUN:-} ]] || ready ${DATASETS:-}
    lines=$(plan "$@")
    [[ -n $lines ]] || { echo "nothing to run: no data set for $* is prepared, see python prepare_data.py --help" >&2; exit 1; }
    benchmark <<<"$lines"
}

test_packages() {
    "$PYTHON" -m pip install --quiet pytest pytest-xdist ruff segmentation-models-pytorch scikit-image scikit-learn lightly \
        matplotlib tifffile pydicom
}

tests() {
    export OMP_NUM_THREADS=1                # two tests at a time, a core each; no folder is kept
    "$PYTHON" -m ruff check .
    "$PYTHON" -m pytest -q -n 2 -o markers=bench -o tmp_path_retention_policy=none -m 'not bench' test_smoke.py
}

SHARD=${SHARD:-1/1}
[[ $SHARD =~ ^([0-9]+)/([0-9]+)$ ]] && ((1 <= BASH_REMATCH[1] && BASH_REMATCH[1] <= BASH_REMATCH[2])) ||
    { echo "SHARD=$SHARD is not of the form 2/8" >&2; exit 2; }
what=${1:-}
if [[ -z $what ]]; then
    what=main
    [[ -n ${DATASETS:-} || -n $(DRY_RUN='' prepared dm tissuenet isic xray) ]] || what=demo
fi
case $what in
    demo) setup; demo ;;
    main | ablations | classify | drone) setup; parts "$what" ;;
    all) setup; parts main ablations classify drone ;;
    test) setup; test_packages; tests ;;
    bench) setup; test_packages; "$PYTHON" -m pytest -q -o markers=bench -m bench test_smoke.py ;;
    job) job "$2" ;;                        # called by xargs
    help | -h | --help) help ;;
    *) printf 'unknown command: %s\n' "$what" >&2; help >&2; exit 2 ;;
esac
