#!/usr/bin/env bash
# bash run_all.sh             main, where a data set of the paper is prepared, else demo
# bash run_all.sh demo        pre-training, few labels, scores and masks on drawn pictures; minutes
# bash run_all.sh main        Tables 1, 2 and Figures 3, 4, 10: methods x backbones x seeds
# bash run_all.sh ablations   Tables 3, 4, 5, 7, 8 and B.1: threshold, loss, epochs, batch size
# bash run_all.sh classify    Table 9: linear probes; drone: Table 10
# bash run_all.sh all         main, ablations, classify and drone
# bash run_all.sh test        install test-only packages, run the tests; bench: the benchmarks
#
# DATASETS   "isic xray", names without blanks and %; unset: those of the paper that are prepared
# SEEDS      "0 1 2 3 4"; drone "0 1 2"
# METHODS    "medsass byol simsiam dino mae simmim"
# BACKBONES  "resnet50 vit_small"
# PROTOCOLS  "transfer frozen finetune"; also semi, of whole U-Nets
# LABELS     "0.01 0.1 1.0", for frozen, finetune, semi and supervised
# EPOCHS     50, of pre-training and on labels; the demo 16 and 10; demo and semi: at least 2
# SIZE       side of the demo's pictures; other data sets must have been prepared at it
# SHARD      2/8: every eighth run from the second on; machines or a SLURM array share the work
# JOBS       runs at a time on this machine: 1, the demo 2; the cores are shared between them
# GPUS       "0 1 2 3": a run at a time on each of these devices, instead of JOBS
# DRY_RUN    1: only list every run, with its evaluations (of RUN) below it
#
# Finished runs are skipped, interrupted ones resume, failed ones are listed with their logs.
# Several run_all.sh may run at once. If Python does not meet requirements.txt, .venv is made.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
METHODS=${METHODS:-medsass byol simsiam dino mae simmim}
PROTOCOLS=${PROTOCOLS:-transfer frozen finetune}
LABELS=${LABELS:-0.01 0.1 1.0}
SHARD=${SHARD:-1/1}

die() {
    echo "$*" >&2
    exit 1
}

# ---------------------------------------------------------------------------------------- the plan
# A line a network and a use of it: `python pretrain.py FLAGS|FLAGS of finetune_eval.py`; where
# nothing is pre-trained `python finetune_eval.py FLAGS`. No default is spelled out. printf prints
# its line once for each of the words that follow.

# pretrained PROTOCOLS FLAGS
pretrained() {
    local protocol run="python pretrain.py $2$epochs"
    [[ $1 != *transfer* ]] || echo "$run|--protocol transfer"
    for protocol in ${1/transfer/}; do
        printf "$run|--protocol $protocol --labels %s$epochs\n" $LABELS
    done
}

# encoders PROTOCOLS: of each method, what trains an encoder alone.
encoders() {
    local method
    for method in $METHODS; do
        case $method/$backbone in
            medsass/*) pretrained "$1" "$on --train encoder" ;;
            byol/vit_small | simsiam/vit_small | mae/resnet50 | simmim/resnet50) ;;
            *) pretrained "$1" "$on --method $method" ;;
        esac
    done
}

main() {
    printf "python finetune_eval.py $on --protocol supervised --labels %s$epochs\n" $LABELS
    encoders "${PROTOCOLS/semi/}"           # semi needs a whole U-Net
    [[ $METHODS == *medsass* ]] || return 0
    pretrained "$PROTOCOLS" "$on"
    pretrained "$PROTOCOLS" "$on --refine"
}

ablations() {
    local encoder="python pretrain.py $on --train encoder" transfer='|--protocol transfer\n'
    printf "$encoder%s$transfer" ' --epochs 10' ' --epochs 20' '' ' --epochs 70'
    printf "$encoder%s$epochs$transfer" '' ' --batch-size 8' ' --batch-size 32'
    [[ $backbone == resnet50 ]] || return 0
    printf "python pretrain.py $on%s$epochs$transfer" '' \
        ' --threshold adaptive_mean' ' --threshold adaptive_gaussian' ' --threshold ght' \
        ' --loss tversky' ' --loss focal' ' --loss bce'
}

# plan PARTS...: each run of these once, with all that is made of it; every n-th for SHARD k/n.
plan() {
    local part sets seeds dataset seed backbone on epochs=${EPOCHS:+ --epochs $EPOCHS}
    for part in "$@"; do
        sets=${DATASETS:-dm tissuenet isic xray} seeds=${SEEDS:-0 1 2 3 4}
        case $part in
            classify) sets=${DATASETS:-isic xray} ;;
            drone) sets=drone seeds=${SEEDS:-0 1 2} ;;
        esac
        for dataset in $sets; do
            [[ -f data/$dataset/meta.json || " ${DATASETS:-} " == *" $dataset "* ||
                -n ${DRY_RUN:-} && ! -d data ]] || continue
            for seed in $seeds; do
                for backbone in ${BACKBONES:-resnet50 vit_small}; do
                    on="--dataset $dataset --backbone $backbone --seed $seed"
                    [[ $part/$backbone != drone/vit_small ]] || continue
                    [[ $part == classify ]] ||
                        echo "python finetune_eval.py $on --protocol reference"
                    case $part in
                        classify) LABELS=1.0 encoders classify ;;
                        drone) encoders transfer ;;
                        *) $part ;;
                    esac
                done
            done
        done
    done | awk -F'|' -v k="${SHARD%/*}" -v n="${SHARD#*/}" '
        !($1 in line) { run[++runs] = line[$1] = $1 }
        NF > 1 && !seen[$0]++ { line[$1] = line[$1] "|" $2 }
        END { for (i = k + 0; i <= runs; i += n) print line[run[i]] }'
}

# -------------------------------------------------------------------------------------- the driver

setup() {
    PYTHON=python3
    $PYTHON -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die 'Python >= 3.10 is needed'
    $PYTHON -m pip --isolated install --dry-run --no-index -r requirements.txt &>/dev/null && return
    [[ -x .venv/bin/python ]] || $PYTHON -m venv .venv
    PYTHON=.venv/bin/python                 # matplotlib, if it is there, draws the report's charts
    $PYTHON -m pip install --quiet -r requirements.txt matplotlib
}

# finished LOG: is the file that it names as made there, and no older than data and run? Sets $made.
finished() {
    made=$(grep -E '[.](png|json)$' "$1" 2>/dev/null | tail -n 1)
    [[ -f $made && $1 -nt data/$dataset/meta.json && ! ${run:-}/samples.png -nt $1 ]]
}

# run_unless_finished SCRIPT FLAGS...: sets $made.
run_unless_finished() {
    local code=0 log=$*
    log=results/logs/${log//[ \/]/_}.log
    finished "$log" && return
    echo "[${fields[0]}] python $*" >&2
    $PYTHON "$@" >"$WORK/$$" 2>&1 || code=$?
    if ((code == 75)); then
        echo '    another process is at it: later' >&2
        printf '%s\0' "$line" >>"$WORK/later"
        exit
    fi
    mv "$WORK/$$" "$log"
    ((code == 0)) && finished "$log" && return
    printf 'failed, exit code %s: python %s\n    log: %s\n' $code "$*" "$log" >>"$WORK/failed"
    return 1
}

# job NUMBER|LINE of the plan
job() {
    local line=$1 dataset run fields flags gpus=(${GPUS:-})
    [[ -z ${GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT]}
    IFS='|' read -r -a fields <<<"$line"
    read -r _ _ _ dataset _ <<<"${fields[1]}"
    run_unless_finished ${fields[1]#python } || return 0    # nothing can be made of it
    run=${made%/*}
    for flags in "${fields[@]:2}"; do
        run_unless_finished finetune_eval.py --run "$run" $flags || true
    done
}

# Tell xargs and its runs to stop; they have a minute to save.
stop_runs() {
    kill -- "-$group" 2>/dev/null || true
    timeout 60 bash -c "while kill -0 -- -$group; do sleep 0.2; done" 2>/dev/null || true
    echo 'stopped; the same command goes on' >&2
    exit 130
}

# benchmark PLAN: run what is missing of it, and write the report.
benchmark() {
    local code=0 jobs=${JOBS:-1} name group cores
    [[ -n $1 ]] || exec echo 'nothing to run: see python prepare_data.py --help for data'
    [[ -z ${DRY_RUN:-} ]] || exec cat <<<"${1//|/$'\n'    python finetune_eval.py --run RUN }"
    setup
    for name in $(cut -d ' ' -f 4 <<<"$1" | sort -u); do
        if [[ $name == demo && ! -d data/demo ]]; then      # another process may be drawing it
            $PYTHON prepare_data.py --dataset demo ${SIZE:+--size "$SIZE"} || sleep 10
        fi
        [[ -f data/$name/test_masks.npy ]] && grep -q "size.: ${SIZE:-.*}," data/$name/meta.json ||
            die "data/$name is not prepared${SIZE:+ at --size $SIZE}, or has no masks to score by"
    done
    [[ -z ${GPUS:-} ]] || jobs=$(wc -w <<<"$GPUS")
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || die "JOBS=$jobs is not a number from 1 up"
    cores=$(getconf _NPROCESSORS_ONLN)      # are shared, not fought over
    ((jobs == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
    export PYTHON WORK=results/logs/running-$HOSTNAME-$$
    mkdir -p "$WORK"
    trap 'rm -r "$WORK"' EXIT
    awk -v n="$(wc -l <<<"$1")" '{ print NR "/" n "|" $0 }' <<<"$1" | tr '\n' '\0' >"$WORK/later"
    while mv "$WORK/later" "$WORK/plan" 2>/dev/null; do
        set -m                              # a process group of its own, to be stopped as one
        xargs -0 -n 1 -P "$jobs" ${GPUS:+--process-slot-var=SLOT} "$BASH" run_all.sh job \
            <"$WORK/plan" &
        group=$!
        set +m
        trap stop_runs INT TERM HUP
        wait $group || code=1
        [[ ! -f $WORK/later ]] || sleep 10
    done
    cat "$WORK/failed" >&2 2>/dev/null && code=1
    trap - INT TERM HUP
    $PYTHON finetune_eval.py --report || code=1
    return $code
}

# What Otsu's threshold draws, what MedSASS makes of it, and what six labels add.
demo() {
    local on='--dataset demo --backbone resnet50 --seed 0' few="--labels 0.1 --epochs ${EPOCHS:-10}"
    local refined="python pretrain.py $on --refine --epochs ${EPOCHS:-16}"
    JOBS=${JOBS:-2} benchmark "\
$refined|--protocol transfer|--protocol semi $few|--protocol finetune $few
python pretrain.py $on --epochs ${EPOCHS:-16}|--protocol transfer
python finetune_eval.py $on --protocol reference
python finetune_eval.py $on --protocol supervised $few"
    mkdir -p predictions/pictures
    $PYTHON -c 'import numpy, PIL.Image
for k, image in enumerate(numpy.load("data/demo/test_images.npy")[:4]):
    PIL.Image.fromarray(image).save(f"predictions/pictures/{k}.png")'
    dataset=demo run_unless_finished ${refined#python }     # it is: this sets $made
    $PYTHON finetune_eval.py --run "${made%/*}" --predict predictions/pictures \
        --out predictions/masks --overlay --overwrite
    echo "
Table: results/README.md; chart: results/demo.png; masks of a folder: predictions/masks
Image, Otsu, refined mask and prediction: $made
Next, your own images:
    python prepare_data.py --dataset folder --raw my_images
    python pretrain.py --dataset my_images --refine
and the whole benchmark in miniature:
    DATASETS=demo EPOCHS=1 SEEDS='0 1' bash run_all.sh main"
}

tests() {
    setup
    $PYTHON -m pip install --quiet pytest pytest-xdist ruff segmentation-models-pytorch \
        scikit-image scikit-learn lightly matplotlib tifffile pydicom
    $PYTHON -m pytest -q -o markers=bench -o tmp_path_retention_policy=none "$@" test_smoke.py
}

[[ $SHARD =~ ^0*([1-9][0-9]*)/0*([1-9][0-9]*)$ ]] && ((BASH_REMATCH[1] <= BASH_REMATCH[2])) ||
    die "SHARD=$SHARD is not of the form 2/8"
what=${1:-main}
[[ -n ${1:-} || -n $(DRY_RUN='' SHARD=1/1 plan main) ]] || what=demo
case $what in
    main | ablations | classify | drone) benchmark "$(plan $what)" ;;
    all) benchmark "$(plan main ablations classify drone)" ;;
    demo) demo ;;
    test) OMP_NUM_THREADS=1 tests -n 2 -m 'not bench' ;;
    bench) tests -m bench -s ;;
    job) job "$2" ;;
    help | -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh ;;
    *) die "there is no $what: see bash run_all.sh help" ;;
esac
