#!/usr/bin/env bash
# MedSASS, from nothing to a result table. `bash run_all.sh help` says what it can do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
bash run_all.sh             set up, then the demo: every method in miniature, scored and reported, in minutes
bash run_all.sh main        the paper's Tables 1, 2 and Figures 3, 4, 10: methods x backbones x seeds
bash run_all.sh ablations   Tables 3, 4, 5, 7, 8 and B.1: threshold, loss, epochs, batch size
bash run_all.sh classify    Table 9: linear probes
bash run_all.sh drone       Table 10
bash run_all.sh all         main, ablations, classify and drone
bash run_all.sh test        set up, add the test-only packages, run the tests
bash run_all.sh bench       set up, run the benchmarks against other libraries; results/bench.json
bash run_all.sh help        this text

From the environment:
DATASETS   prepared data sets, e.g. "isic xray"; unset: those of the paper that are prepared. With DATASETS set, run_all.sh
           alone is main
SEEDS      "0 1 2 3 4"; drone "0 1 2"               METHODS    "medsass byol simsiam dino mae simmim"
BACKBONES  "resnet50 vit_small"                     EPOCHS     50, of pre-training and of training on labels
PROTOCOLS  "transfer frozen finetune"; also semi, of whole U-Nets
LABELS     "0.01 0.1 1.0", for frozen, finetune, semi and supervised
SIZE       side of the demo's pictures; other data sets must have been prepared at it
SHARD      2/8: every eighth run, beginning with the second; machines or a SLURM array then share the work
JOBS       runs at a time on this machine: 1, the demo 2; the cores are shared between them
GPUS       "0 1 2 3": a run at a time on each of these devices, instead of JOBS
DRY_RUN    1: print every command, a line each, and do nothing

What is finished is skipped, what was cut goes on where it stopped. Several of these may run at once: no run is trained by
two of them. A run that fails does not stop the others; it is listed at the end with its log, and the exit code is 1.
Set-up uses the active Python environment if it already satisfies requirements.txt; otherwise it makes .venv here (or
re-uses it) and installs into that.
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
    [[ -z ${DRY_RUN:-} ]] || return 0
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

# ------------------------------------------------------------------------------------------------------------ the plan
# A plan is lines "job <tab> product <tab> command": commands of one job depend on each other and stay together; a command
# whose product is there is done.

# pretrained DATASET BACKBONE SEED PROTOCOLS FLAGS...: one pre-training and what is made of it. FLAGS: of pretrain.py, as
# "flag value" pairs in the order in which a run's folder names them.
pretrained() {
    local dataset=$1 backbone=$2 seed=$3 protocols=$4 method=medsass variant='' flags='' protocol
    shift 4
    [[ " $* " == *' --epochs '* || -z ${EPOCHS:-} ]] || set -- "$@" --epochs "$EPOCHS"
    while (($#)); do
        case "$1 $2" in
            '--epochs 50' | '--batch-size 16' | '--threshold otsu' | '--loss focal_tversky') shift 2; continue ;;  # defaults
            --method*) method=$2 ;;
            '--refine all') method+=+; flags+=' --refine'; shift 2; continue ;;
            --epochs*) variant+=-e$2 ;;
            --batch-size*) variant+=-b$2 ;;
            *) variant+=-$2 ;;
        esac
        flags+=" $1 $2"
        shift 2
    done
    local name=$dataset/$backbone/$method$variant/seed$seed
    printf '%s\t%s\t%s\n' "$name" "runs/$name/samples.png" \
        "python pretrain.py --dataset $dataset --backbone $backbone$flags --seed $seed"
    for protocol in $protocols; do
        case $protocol in
            transfer) evaluation "$name" "$name/transfer" "--run runs/$name" ;;
            semi) [[ $method != medsass* || $variant == *-encoder* ]] || labelled "$name" "$name/semi" "--run runs/$name --protocol semi" ;;
            classify) LABELS=1.0 labelled "$name" "$name/classify" "--run runs/$name --protocol classify" ;;
            *) labelled "$name" "$name/$protocol" "--run runs/$name --protocol $protocol" ;;
        esac
    done
}

# evaluation JOB RESULT FLAGS: one line of finetune_eval.py.
evaluation() {
    printf '%s\t%s\t%s\n' "$1" "results/$2.json" "python finetune_eval.py $3"
}

# reference DATASET BACKBONE SEED: the rows that cost nothing.
reference() {
    local name=$1/$2/reference/seed$3
    evaluation "$name" "$name/reference" "--dataset $1 --backbone $2 --protocol reference --seed $3"
}

# labelled JOB RESULT FLAGS: training with each of $LABELS.
labelled() {
    local labels epochs=${EPOCHS:-50}
    [[ $epochs != 50 ]] || epochs=''
    for labels in $LABELS; do
        [[ $labels != 1.0 ]] || labels=''
        evaluation "$1" "$2${labels:+-l$labels}${epochs:+-e$epochs}" "$3${labels:+ --labels $labels}${epochs:+ --epochs $epochs}"
    done
}

# encoders DATASET BACKBONE SEED PROTOCOLS: every method that trains an encoder on this backbone, MedSASS among them.
encoders() {
    local method
    for method in $METHODS; do
        case $method/$2 in
            medsass/*) pretrained "$@" --train encoder ;;
            byol/vit_small | simsiam/vit_small | mae/resnet50 | simmim/resnet50) ;;
            *) pretrained "$@" --method "$method" ;;
        esac
    done
}

plan_main() {
    local dataset backbone seed
    for dataset in $DATASETS; do for seed in $SEEDS; do for backbone in $BACKBONES; do
        local at=$dataset/$backbone
        reference "$dataset" "$backbone" "$seed"
        labelled "$at/supervised/seed$seed" "$at/supervised/seed$seed/supervised" \
            "--dataset $dataset --backbone $backbone --protocol supervised --seed $seed"
        if [[ " $METHODS " == *' medsass '* ]]; then
            pretrained "$dataset" "$backbone" "$seed" "$PROTOCOLS"
            pretrained "$dataset" "$backbone" "$seed" "$PROTOCOLS" --refine all
        fi
        encoders "$dataset" "$backbone" "$seed" "$PROTOCOLS"
    done; done; done
}

plan_ablations() {
    local dataset backbone seed value
    for dataset in $DATASETS; do for seed in $SEEDS; do
        for value in adaptive_mean adaptive_gaussian ght otsu; do
            pretrained "$dataset" resnet50 "$seed" transfer --threshold "$value"
        done
        for value in tversky focal focal_tversky bce; do
            pretrained "$dataset" resnet50 "$seed" transfer --loss "$value"
        done
        for backbone in $BACKBONES; do
            reference "$dataset" "$backbone" "$seed"
            for value in 10 20 50 70; do
                pretrained "$dataset" "$backbone" "$seed" transfer --train encoder --epochs "$value"
            done
            for value in 8 16 32; do
                pretrained "$dataset" "$backbone" "$seed" transfer --train encoder ${EPOCHS:+--epochs "$EPOCHS"} --batch-size "$value"
            done
        done
    done; done
}

plan_classify() {
    local dataset backbone seed
    for dataset in $DATASETS; do for seed in $SEEDS; do for backbone in $BACKBONES; do
        encoders "$dataset" "$backbone" "$seed" classify
    done; done; done
}

plan_drone() {
    local seed
    for seed in $SEEDS; do
        reference drone resnet50 "$seed"
        encoders drone resnet50 "$seed" transfer
    done
}

# prepared NAMES...: those of the names that are prepared.
prepared() {
    local name
    for name in "$@"; do
        [[ ! -f data/$name/meta.json ]] || printf '%s ' "$name"
    done
}

# plan WHAT: the lines of a part of the benchmark, with the defaults of what the environment does not set.
plan() (
    METHODS=${METHODS:-medsass byol simsiam dino mae simmim} BACKBONES=${BACKBONES:-resnet50 vit_small}
    PROTOCOLS=${PROTOCOLS:-transfer frozen finetune} LABELS=${LABELS:-0.01 0.1 1.0} own=${DATASETS:-}
    SEEDS=${SEEDS:-$([[ $1 == drone ]] && echo 0 1 2 || echo 0 1 2 3 4)}
    case $1 in
        classify) papers='isic xray' ;;
        drone) papers=drone own='' ;;
        *) papers='dm tissuenet isic xray' ;;
    esac
    DATASETS=${own:-$(prepared $papers)}
    [[ -n $DATASETS || -z ${DRY_RUN:-} ]] || DATASETS=$papers    # nothing is prepared yet: what would be run
    [[ -n $DATASETS ]] || { echo "$1: none of $papers is prepared: see python prepare_data.py --help" >&2; return 0; }
    "plan_$1"
)

# shard K N: a plan's lines by job, each once, the job's number before them; only jobs K, K + N, K + 2N, ...
shard() {
    awk -F'\t' -v k="$1" -v n="$2" '
        seen[$0]++ { next }
        !($1 in number) { number[$1] = ++jobs }
        { lines[number[$1]] = lines[number[$1]] number[$1] "\t" $2 "\t" $3 "\n" }
        END { for (j = 1; j <= jobs; j++) if (j % n == k % n) printf "%s", lines[j] }'
}

# ---------------------------------------------------------------------------------------------------------- the driver

# attempt PRODUCT COMMAND: 0 done, 75 another process is at it, else failed.
attempt() {
    local log=results/logs/${1//\//_}.log code=0
    mkdir -p results/logs
    "$PYTHON" ${2#python } >"$log.$$" 2>&1 &                      # the plan's words hold no blanks
    child=$!
    wait "$child" || code=$?
    [[ $code == 75 ]] && rm -f "$log.$$" || mv "$log.$$" "$log"
    return $code
}

# drive CLAIMS: run the plan on standard input, by jobs that no other driver of this call has claimed (a folder in CLAIMS);
# what another process is at is tried again until it is done.
drive() {
    local lines all later failed='' mine=' ' bad=' ' busy number product command code total first start=$SECONDS child=''
    all=$(cat) lines=$all
    total=$(grep -c . <<<"$all" || true) first=$(count_done "$all")
    trap 'kill "$child" 2>/dev/null; exit 143' TERM
    while [[ -n $lines ]]; do
        later='' busy=' '
        while IFS=$'\t' read -r number product command; do
            if [[ $mine != *" $number "* ]]; then
                mkdir "$1/$number" 2>/dev/null || continue      # the other driver's
                mine+="$number "
            fi
            if [[ -f $product ]]; then
                continue
            elif [[ $bad == *" $number "* ]]; then              # it builds on a run that failed
                failed+=$'\n'"  not tried: $command"
            elif [[ $busy == *" $number "* ]]; then             # it builds on a run that another process is at
                later+=$number$'\t'$product$'\t'$command$'\n'
            else
                progress "$(count_done "$all")" "$first" "$total" $((SECONDS - start))
                echo "$command"
                code=0
                attempt "$product" "$command" </dev/null || code=$?
                if [[ $code == 75 ]]; then
                    echo '    another process is at work on this: later'
                    later+=$number$'\t'$product$'\t'$command$'\n'
                    [[ $command != *pretrain.py* ]] || busy+="$number "
                elif [[ $code != 0 ]]; then
                    echo "    failed with exit code $code"
                    failed+=$'\n'"  exit code $code: $command"$'\n'"    log: results/logs/${product//\//_}.log"
                    [[ $command != *pretrain.py* ]] || bad+="$number "
                fi
            fi
        done <<<"$lines"
        lines=${later%$'\n'}
        [[ -z $lines ]] || sleep 5
    done
    [[ -z $failed ]] || { printf '\nfailed:%s\n' "$failed" >&2; return 1; }
}

# count_done LINES: how many of a plan's products are there.
count_done() {
    local number product command done=0
    while IFS=$'\t' read -r number product command; do
        [[ ! -f $product ]] || done=$((done + 1))
    done <<<"$1"
    echo "$done"
}

# progress DONE FIRST TOTAL SECONDS: "[3/70, about 9 min left] "; FIRST were done before these SECONDS.
progress() {
    local left=''
    (($1 == $2)) || left=", about $(($4 * ($3 - $1) / ($1 - $2) / 60 + 1)) min left"
    printf '[%d/%d%s] ' "$1" "$3" "$left"
}

# The demo's pictures, unless they are there; another process may be drawing them.
draw_demo() {
    local code
    while [[ ! -f data/demo/meta.json ]]; do
        code=0
        "$PYTHON" prepare_data.py --dataset demo ${SIZE:+--size "$SIZE"} || code=$?
        [[ $code == 0 || -f data/demo/meta.json ]] || { [[ $code == 75 ]] && sleep 2 || exit "$code"; }
    done
}

# right_size DATASETS...: stop where one is not prepared, or not at $SIZE.
right_size() {
    local name
    for name in "$@"; do
        [[ -f data/$name/meta.json ]] || { echo "data/$name is not prepared: see python prepare_data.py --help" >&2; exit 1; }
        [[ -z ${SIZE:-} ]] || grep -q "\"size\": $SIZE," "data/$name/meta.json" ||
            { echo "data/$name is not prepared at SIZE=$SIZE: prepare it again with --size $SIZE --overwrite" >&2; exit 1; }
    done
}

# benchmark PARTS...: plan them, run what is missing, write the report.
benchmark() {
    local code=0 part lines claims drivers=() driver k n jobs=${JOBS:-1} gpus=(${GPUS:-})
    ((${#gpus[@]} == 0)) || jobs=${#gpus[@]}
    [[ ${SHARD:-1/1} =~ ^([0-9]+)/([0-9]+)$ ]] && k=${BASH_REMATCH[1]} n=${BASH_REMATCH[2]} && ((1 <= k && k <= n)) ||
        { echo "SHARD=$SHARD is not of the form 2/8" >&2; exit 2; }
    if [[ -n ${DRY_RUN:-} ]]; then
        for part in "$@"; do plan "$part"; done | shard "$k" "$n" | cut -f3
        return
    fi
    [[ " ${DATASETS:-} " != *' demo '* ]] || draw_demo
    right_size ${DATASETS:-}
    lines=$(for part in "$@"; do plan "$part"; done)
    if ((jobs > 1)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then      # cores are shared, not fought over
        OMP_NUM_THREADS=$(("$("$PYTHON" -c 'import os; print(os.cpu_count())')" / jobs)) && ((OMP_NUM_THREADS)) || OMP_NUM_THREADS=1
        export OMP_NUM_THREADS
    fi
    trap 'kill "${drivers[@]}" 2>/dev/null; echo "stopped; the same command goes on" >&2; exit 130' INT TERM
    lines=$(shard "$k" "$n" <<<"$lines") claims=$(mktemp -d)
    for ((driver = 0; driver < jobs; driver++)); do
        { [[ -z ${GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[driver]}; drive "$claims"; } <<<"$lines" &
        drivers+=($!)
    done
    for driver in "${drivers[@]}"; do wait "$driver" || code=$?; done
    rm -r "$claims"
    ! ls results/*/*/*/*/*.json >/dev/null 2>&1 || "$PYTHON" finetune_eval.py --report || code=1
    return "$code"
}

demo() {
    # One run long enough to see the method work, then all of main in miniature.
    export DATASETS=demo SEEDS=${SEEDS:-0 1} PROTOCOLS=${PROTOCOLS:-transfer finetune} LABELS=${LABELS:-0.1}
    plan_shown() { METHODS=medsass EPOCHS=30 pretrained demo resnet50 0 transfer; }
    JOBS=${JOBS:-2} EPOCHS=${EPOCHS:-1} benchmark shown main
    [[ -n ${DRY_RUN:-} ]] || printf '\n%s\n' 'Next: your own images.  python prepare_data.py --dataset folder --raw my_images && DATASETS=my_images bash run_all.sh'
}

test_packages() {
    run "$PYTHON" -m pip install --quiet pytest pytest-xdist segmentation-models-pytorch scikit-image scikit-learn lightly matplotlib tifffile pydicom
}

tests() {
    export OMP_NUM_THREADS=1                                    # two tests at a time, a core each; no folder is kept
    run "$PYTHON" -m pytest -q -n 2 -o markers=bench -o tmp_path_retention_policy=none -m 'not bench' test_smoke.py
}

what=${1:-demo}
[[ $what != demo || -z ${DATASETS:-} ]] || what=main
case $what in
    demo) setup; demo ;;
    main | ablations | classify | drone) setup; benchmark "$what" ;;
    all) setup; benchmark main ablations classify drone ;;
    test) setup; test_packages; tests ;;
    bench) setup; test_packages; run "$PYTHON" -m pytest -q -o markers=bench -m bench test_smoke.py ;;
    help | -h | --help) help ;;
    *) printf 'unknown command: %s\n' "$what" >&2; help >&2; exit 2 ;;
esac
