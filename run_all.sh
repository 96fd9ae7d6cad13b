#!/usr/bin/env bash
# MedSASS, from nothing to a result table. `bash run_all.sh help` says what it can do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
bash run_all.sh             set up; then main, where a data set of the paper is prepared, else demo
bash run_all.sh demo        pre-training, few labels, scores and masks on drawn pictures; minutes
bash run_all.sh main        Tables 1, 2 and Figures 3, 4, 10: methods x backbones x seeds
bash run_all.sh ablations   Tables 3, 4, 5, 7, 8 and B.1: threshold, loss, epochs, batch size
bash run_all.sh classify    Table 9: linear probes
bash run_all.sh drone       Table 10
bash run_all.sh all         main, ablations, classify and drone
bash run_all.sh test        set up, add the test-only packages, run the tests
bash run_all.sh bench       set up, run the benchmarks against other libraries; results/bench.json

From the environment:
DATASETS   "isic xray", prepared data sets without blanks in names; unset: the paper's, if prepared
SEEDS      "0 1 2 3 4"; drone "0 1 2"
METHODS    "medsass byol simsiam dino mae simmim"
BACKBONES  "resnet50 vit_small"
PROTOCOLS  "transfer frozen finetune"; also semi, of whole U-Nets
LABELS     "0.01 0.1 1.0", for frozen, finetune, semi and supervised
EPOCHS     50, of pre-training and of training on labels; the demo 16 and 10
SIZE       side of the demo's pictures; other data sets must have been prepared at it
SHARD      2/8: every eighth run from the second on; machines or a SLURM array then share the work
JOBS       runs at a time on this machine: 1, the demo 2; the cores are shared between them
GPUS       "0 1 2 3": a run at a time on each of these devices, instead of JOBS
DRY_RUN    1: list every run, with what is made of it (RUN) below, and do nothing

What is finished is skipped, what was cut goes on where it stopped. Several of these may run at
once: no run is trained by two of them. A run that fails does not stop the others; it is listed at
the end with its log, and the exit code is 1. Set-up uses the active Python environment if it
satisfies requirements.txt; otherwise it makes .venv here (or re-uses it) and installs into that.
TEXT
}

die() {
    echo "$*" >&2
    exit 1
}

# Whether a Python has all that requirements.txt asks for, and can import it.
satisfied() {
    local plan
    plan=$("$1" -m pip install --dry-run --no-index -r requirements.txt 2>/dev/null) || return 1
    [[ $plan != *"Would install"* ]] || return 1
    "$1" -c 'import torch, torchvision, timm, cv2, PIL, tqdm' 2>/dev/null
}

# Sets $PYTHON.
setup() {
    [[ -z ${DRY_RUN:-} ]] || return 0
    PYTHON=$(command -v python3 || command -v python) || die 'Python 3.10 or newer is needed'
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed; $PYTHON is $("$PYTHON" -V)"
    if ! satisfied "$PYTHON"; then
        [[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
        PYTHON=.venv/bin/python             # matplotlib, if it is there, draws the report's charts
        satisfied "$PYTHON" || "$PYTHON" -m pip install --quiet -r requirements.txt matplotlib
    fi
}

# ---------------------------------------------------------------------------------------- the plan
# A line a network: the flags of pretrain.py (none where nothing is pre-trained), then, after
# each |, flags of finetune_eval.py for what is made of it.

# on_labels FLAGS: an evaluation with each of $LABELS.
on_labels() {
    local labels
    for labels in $LABELS; do
        printf '|%s --labels %s' "$1" "$labels"
        [[ ${EPOCHS:-50} == 50 ]] || printf ' --epochs %s' "$EPOCHS"
    done
}

# pretrained PROTOCOLS FLAGS: pre-training, and its evaluations.
pretrained() {
    local flags=" $2 " protocol usual
    [[ $flags == *' --epochs '* ]] || flags+="${EPOCHS:+--epochs $EPOCHS }"
    for usual in 'threshold otsu' 'loss focal_tversky' 'epochs 50' 'batch-size 16'; do
        flags=${flags/ --$usual / }         # a run that is in two tables is then one
    done
    flags=${flags# }
    printf '%s' "${flags% }"
    for protocol in $1; do
        case $protocol in
            transfer) printf '|--protocol transfer' ;;
            classify) LABELS=1.0 on_labels '--protocol classify' ;;
            semi)
                [[ $flags == *'--method '* || $flags == *'--train encoder'* ]] ||
                    on_labels '--protocol semi'
                ;;
            *) on_labels "--protocol $protocol" ;;
        esac
    done
    echo
}

# encoders PROTOCOLS BACKBONE FLAGS: every method that trains an encoder on this backbone.
encoders() {
    local method
    for method in $METHODS; do
        case $method/$2 in
            medsass/*) pretrained "$1" "$3 --train encoder" ;;
            byol/vit_small | simsiam/vit_small | mae/resnet50 | simmim/resnet50) ;;
            *) pretrained "$1" "$3 --method $method" ;;
        esac
    done
}

# plan_of PART DATASET SEED BACKBONE: its lines.
plan_of() {
    local on="--dataset $2 --backbone $4 --seed $3" value
    [[ $1/$4 != drone/vit_small ]] || return 0
    [[ $1 == classify ]] || echo "|$on --protocol reference"
    case $1 in
        main)
            for value in $LABELS; do
                LABELS=$value on_labels "$on --protocol supervised"
                echo
            done
            if [[ " $METHODS " == *' medsass '* ]]; then
                pretrained "$PROTOCOLS" "$on"
                pretrained "$PROTOCOLS" "$on --refine"
            fi
            encoders "$PROTOCOLS" "$4" "$on"
            ;;
        ablations)
            for value in 'epochs 10' 'epochs 20' 'epochs 50' 'epochs 70' \
                'batch-size 8' 'batch-size 16' 'batch-size 32'; do
                pretrained transfer "$on --train encoder --$value"
            done
            [[ $4 == resnet50 ]] || return 0
            for value in 'threshold adaptive_mean' 'threshold adaptive_gaussian' 'threshold ght' \
                'threshold otsu' 'loss tversky' 'loss focal' 'loss bce'; do
                pretrained transfer "$on --$value"
            done
            ;;
        classify) encoders classify "$4" "$on" ;;
        drone) encoders transfer "$4" "$on" ;;
    esac
}

# plan PARTS...: the lines of parts of the benchmark, with the defaults of what the environment
# does not set; each run once, with all that is made of it; of SHARD k/n every n-th from the k-th.
plan() {
    local part dataset seed backbone sets
    local METHODS=${METHODS:-medsass byol simsiam dino mae simmim} LABELS=${LABELS:-0.01 0.1 1.0}
    local PROTOCOLS=${PROTOCOLS:-transfer frozen finetune}
    for part in "$@"; do
        case $part in
            classify) sets=${DATASETS:-$(prepared isic xray)} ;;
            drone) sets=$(prepared drone) ;;
            *) sets=${DATASETS:-$(prepared dm tissuenet isic xray)} ;;
        esac
        [[ -n ${sets// } ]] ||
            echo "$part: no data set for it is prepared, see python prepare_data.py --help" >&2
        for dataset in $sets; do
            for seed in ${SEEDS:-0 1 2 $([[ $part == drone ]] || echo 3 4)}; do
                for backbone in ${BACKBONES:-resnet50 vit_small}; do
                    if [[ -f data/$dataset/meta.json && ! -f data/$dataset/test_masks.npy ]]; then
                        plan_of "$part" "$dataset" "$seed" "$backbone" | sed '/^|/d; s/|.*//'
                    else                    # without test masks nothing can be scored
                        plan_of "$part" "$dataset" "$seed" "$backbone"
                    fi
                done
            done
        done
    done | awk -F'|' -v k="${SHARD%/*}" -v n="${SHARD#*/}" '
        {
            run = $1 == "" ? $0 : $1
            if (!(run in place)) { place[run] = ++runs; line[runs] = run }
            for (i = 2; $1 != "" && i <= NF; i++)
                if (!seen[run, $i]++) line[place[run]] = line[place[run]] "|" $i
        }
        END { for (i = 1; i <= runs; i++) if (i % n == k % n) print line[i] }'
}

# prepared NAMES...: those of the data sets that are prepared; in a dry run, where none is, all.
prepared() {
    local name found=''
    for name in "$@"; do
        [[ ! -f data/$name/meta.json ]] || found+="$name "
    done
    [[ -n $found || -z ${DRY_RUN:-} ]] || found=$*
    echo "$found"
}

# -------------------------------------------------------------------------------------- the driver

# made_by LOG: the file that the scripts name in the last line of what they print.
made_by() {
    grep -E '[.](png|json)$' "$1" 2>/dev/null | tail -n 1
}

# run_unless_done SCRIPT FLAGS...: run it, unless its log names the file that it made, and that is
# there; prints that file.
run_unless_done() {
    local words="$*" code=0 log made
    log=results/logs/${words//[ \/]/_}.log
    made=$(made_by "$log")
    [[ $words =~ (--dataset |--run runs/)([^ /]+) ]]
    if [[ data/${BASH_REMATCH[2]}/meta.json -nt $log ]]; then
        made=''                             # the data set was prepared anew
    fi
    if [[ -f $WORK/${log##*/} ]]; then      # it failed before, in this call
        return 1
    elif [[ ! -f $made ]]; then
        echo "[$NUMBER] python $words" >&2
        "$PYTHON" "$@" >"$log.$$" 2>&1 || code=$?
        if [[ $code == 75 ]]; then
            echo "    another process is working on this run: later" >&2
            touch "$WORK/later"
            return 75
        fi
        mv "$log.$$" "$log"
        made=$(made_by "$log")
        if [[ $code != 0 || ! -f $made ]]; then
            printf '  exit code %s: python %s\n    log: %s\n' $code "$words" "$log" >>"$WORK/failed"
            touch "$WORK/${log##*/}"
            return 1
        fi
    fi
    echo "$made"
}

# job LINE: a line of the plan, with its number before it.
job() {
    local flags run='' fields gpus=(${GPUS:-})
    trap 'rm -f results/logs/*.log.$$' EXIT
    trap 'exit 143' TERM
    [[ -z ${GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT]}
    IFS='|' read -r -a fields <<<"$1"
    NUMBER=${fields[0]}
    if [[ -n ${fields[1]} ]]; then
        run=$(run_unless_done pretrain.py ${fields[1]}) || return 0     # no evaluation without it
        run=${run%/*}
    fi
    ((${#fields[@]} > 2)) || return 0
    for flags in "${fields[@]:2}"; do
        run_unless_done finetune_eval.py ${run:+--run "$run"} $flags >/dev/null || true
    done
}

# stop_runs GROUP: tell xargs and its runs to stop, give them time to save, and exit.
stop_runs() {
    local i
    kill -- "-$1" 2>/dev/null || true
    for ((i = 0; i < 300; i++)); do
        kill -0 -- "-$1" 2>/dev/null || break
        sleep 0.2
    done
    rm -r "$WORK"
    echo 'stopped; the same command goes on' >&2
    exit 130
}

# drive JOBS: the plan on standard input, so many lines at a time; where another process is at a
# run, once more, until all is done.
drive() {
    local code=0 group=''
    export PYTHON WORK GPUS
    WORK=$(mktemp -d)
    mkdir -p results/logs
    awk '{ line[NR] = $0 } END { for (i = 1; i <= NR; i++) print i "/" NR "|" line[i] }' |
        tr '\n' '\0' >"$WORK/plan"
    trap 'stop_runs $group' INT TERM HUP
    while true; do
        rm -f "$WORK/later"
        set -m                              # a process group of its own, to be stopped as one
        xargs -0 -n 1 -P "$1" ${GPUS:+--process-slot-var=SLOT} "$BASH" run_all.sh job \
            <"$WORK/plan" &
        group=$!
        set +m
        wait $group || code=$?
        [[ -f $WORK/later ]] || break
        sleep 10
    done
    trap - INT TERM HUP
    if [[ -f $WORK/failed ]]; then
        printf '\nfailed:\n%s\n' "$(cat "$WORK/failed")" >&2
        code=1
    fi
    rm -r "$WORK"
    return $code
}

# need_datasets NAMES...: stop where one is not prepared, or not at $SIZE; the demo is drawn.
need_datasets() {
    local name meta
    for name in "$@"; do
        meta=data/$name/meta.json
        while [[ $name == demo && ! -f $meta ]]; do
            if ! "$PYTHON" prepare_data.py --dataset demo ${SIZE:+--size "$SIZE"}; then
                sleep 5                     # another process may be drawing them
                [[ -f $meta ]] || die 'the pictures of the demo are not there'
            fi
        done
        [[ -f $meta ]] || die "data/$name is not prepared: see python prepare_data.py --help"
        [[ -z ${SIZE:-} ]] || grep -q "\"size\": $SIZE," "$meta" ||
            die "data/$name is of another SIZE: prepare it again, --size $SIZE --overwrite"
    done
}

# benchmark: run what is missing of the plan on standard input, and write the report.
benchmark() {
    local code=0 gpus=(${GPUS:-}) jobs=${JOBS:-1}
    ((${#gpus[@]} == 0)) || jobs=${#gpus[@]}
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || die "JOBS=$jobs is not a number from 1 up"
    if [[ -n ${DRY_RUN:-} ]]; then
        awk '{
            if (!sub(/^[|]/, "python finetune_eval.py ")) $0 = "python pretrain.py " $0
            gsub(/[|]/, "\n    python finetune_eval.py --run RUN ")
            print
        }'
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
    local on='--dataset demo --backbone resnet50 --seed 0' few='--labels 0.1 --epochs '
    local refined="$on --refine --epochs ${EPOCHS:-16}" samples
    few+=$((${EPOCHS:-10} > 1 ? ${EPOCHS:-10} : 2))         # semi trains in two halves
    [[ -n ${DRY_RUN:-} ]] || need_datasets demo
    JOBS=${JOBS:-2} benchmark <<TEXT
$refined|--protocol transfer|--protocol semi $few|--protocol finetune $few
$on --epochs ${EPOCHS:-16}|--protocol transfer
|$on --protocol reference
|$on --protocol supervised $few
TEXT
    [[ -z ${DRY_RUN:-} ]] || return 0
    samples=$(made_by "results/logs/pretrain.py_${refined// /_}.log")
    "$PYTHON" - <<'TEXT'
import pathlib, numpy, PIL.Image
folder = pathlib.Path("predictions/pictures")
folder.mkdir(parents=True, exist_ok=True)
for k, image in enumerate(numpy.load("data/demo/test_images.npy")[:4]):
    PIL.Image.fromarray(image).save(folder / f"{k}.png")
TEXT
    "$PYTHON" finetune_eval.py --run "${samples%/*}" --predict predictions/pictures \
        --out predictions/masks --overlay --overwrite
    cat <<TEXT

Table: results/README.md; chart: results/demo.png; masks of a folder: predictions/masks
Image, Otsu, refined mask and prediction: $samples
Next, your own images:
    python prepare_data.py --dataset folder --raw my_images
    python pretrain.py --dataset my_images --refine
and the whole benchmark in miniature:
    DATASETS=demo EPOCHS=1 SEEDS="0 1" bash run_all.sh main
TEXT
}

# one_of WORDS GIVEN: stop at a word that is none of WORDS.
one_of() {
    local word
    for word in $2; do
        [[ " $1 " == *" $word "* ]] || die "$word is none of: $1"
    done
}

# parts NAMES...: main, ablations, classify, drone.
parts() {
    local lines
    one_of 'medsass byol simsiam dino mae simmim' "${METHODS:-}"
    one_of 'resnet50 vit_small' "${BACKBONES:-}"
    one_of 'transfer frozen finetune semi' "${PROTOCOLS:-}"
    [[ ${PROTOCOLS:-} != *semi* || ${EPOCHS:-50} != 1 ]] || die 'semi needs EPOCHS=2 or more'
    [[ -n ${DRY_RUN:-} ]] || need_datasets ${DATASETS:-}
    lines=$(plan "$@")
    if [[ -n $lines ]]; then
        benchmark <<<"$lines"
    else
        echo 'nothing to run'
    fi
}

need_no_dry_run() {
    [[ -z ${DRY_RUN:-} ]] || die "DRY_RUN lists runs, and $what has none"
}

tests() {
    "$PYTHON" -m pip install --quiet pytest pytest-xdist ruff segmentation-models-pytorch \
        scikit-image scikit-learn lightly matplotlib tifffile pydicom
    "$PYTHON" -m pytest -q -o markers=bench -o tmp_path_retention_policy=none "$@" test_smoke.py
}

SHARD=${SHARD:-1/1}
if ! [[ $SHARD =~ ^([0-9]+)/([0-9]+)$ ]] ||
    ((10#${BASH_REMATCH[1]} < 1 || 10#${BASH_REMATCH[1]} > 10#${BASH_REMATCH[2]})); then
    echo "SHARD=$SHARD is not of the form 2/8" >&2
    exit 2
fi
what=${1:-}
if [[ -z $what ]]; then
    what=main
    [[ -n ${DATASETS:-} || -n $(DRY_RUN='' prepared dm tissuenet isic xray) ]] || what=demo
fi
case $what in
    demo) setup; demo ;;
    main | ablations | classify | drone) setup; parts "$what" ;;
    all) setup; parts main ablations classify drone ;;
    test) need_no_dry_run; setup; OMP_NUM_THREADS=1 tests -n 2 -m 'not bench' ;;    # a core each
    bench) need_no_dry_run; setup; tests -m bench ;;
    job) job "$2" ;;                        # called by xargs
    help | -h | --help) help ;;
    *)
        help >&2
        echo "unknown command: $what" >&2
        exit 2
        ;;
esac
