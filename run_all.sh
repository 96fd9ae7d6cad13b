#!/usr/bin/env bash
# bash run_all.sh             main, if a data set of the paper is prepared, else demo
# bash run_all.sh demo        pre-training, few labels, scores, masks of made-up pictures; minutes
# bash run_all.sh main        Tables 1, 2 and Figures 3, 4, 10: methods x backbones x seeds
# bash run_all.sh ablations   Tables 3, 4, 5, 7, 8 and B.1: threshold, loss, epochs, batch size
# bash run_all.sh classify    Table 9: linear probes; drone: Table 10; all: these four
# bash run_all.sh test        install test-only packages, run the tests; bench: the benchmarks
# DATASETS   "isic xray"; default: those of the paper that are prepared. SEEDS: "0 1 2 3 4"
# METHODS    "medsass byol simsiam dino mae simmim"; BACKBONES "resnet50 vit_small"
# PROTOCOLS  "transfer frozen finetune", also semi. LABELS: "0.01 0.1 1.0", of all but transfer
# EPOCHS     50, of pre-training and on labels; the demo 16 and 10
# SHARD      2/8: every eighth run from the second on; machines or a SLURM array share the work
# JOBS       runs at a time on this machine: 1, the demo 2; the cores are shared between them
# GPUS       "0 1 2 3": a run at a time on each of these devices, instead of JOBS
# DRY_RUN    1: only list every run, with its evaluations (of RUN) below it
# Finished runs are skipped, stopped ones go on, failed ones are listed with their logs.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
METHODS=${METHODS:-medsass byol simsiam dino mae simmim}
PROTOCOLS=${PROTOCOLS:-transfer frozen finetune}
LABELS=${LABELS:-0.01 0.1 1.0}
SHARD=${SHARD:-1/1}

die() { echo "$*" >&2; exit 1; }
# A line of the plan: `pretrain.py FLAGS|FLAGS of finetune_eval.py`, or, if nothing is pre-trained,
# `finetune_eval.py FLAGS`; flags in the order of the run's name.
pretrained() {                              # PROTOCOLS FLAGS
    local protocol run="pretrain.py $2$epochs"
    [[ $1 != *transfer* ]] || echo "$run|--protocol transfer"
    for protocol in ${1/transfer/}; do
        printf "$run|--protocol $protocol --labels %s$epochs\n" $LABELS
    done
}

encoders() {                                # PROTOCOLS: of all that trains an encoder alone
    for method in $METHODS; do
        case $method/$backbone in
            medsass/*) pretrained "$1" "$on --train encoder" ;;
            byol/vit_small | simsiam/vit_small | mae/resnet50 | simmim/resnet50) ;;
            *) pretrained "$1" "$on --method $method" ;;
        esac
    done
}

main() {
    printf "finetune_eval.py $on --protocol supervised --labels %s$epochs\n" $LABELS
    encoders "${PROTOCOLS/semi/}"           # semi needs a whole U-Net
    [[ $METHODS == *medsass* ]] || return 0
    pretrained "$PROTOCOLS" "$on"
    pretrained "$PROTOCOLS" "$on --refine"
}

classify() { LABELS=1.0 encoders classify; }
drone() { encoders transfer; }
ablations() {
    local encoder="pretrain.py $on --train encoder" transfer='|--protocol transfer\n'
    printf "$encoder%s$transfer" ' --epochs 10' ' --epochs 20' '' ' --epochs 70'
    printf "$encoder$epochs%s$transfer" '' ' --batch-size 8' ' --batch-size 32'
    [[ $backbone != resnet50 ]] || printf "pretrain.py $on%s$epochs$transfer" '' \
        ' --threshold adaptive_mean' ' --threshold adaptive_gaussian' ' --threshold ght' \
        ' --loss tversky' ' --loss focal' ' --loss bce'
}

# plan PARTS...: each run of these once, with all that is made of it; every n-th for SHARD k/n.
plan() {
    local part sets seeds dataset seed backbone method on epochs=" --epochs ${EPOCHS:-50}"
    epochs=${epochs/% --epochs 50}          # the default
    for part in "$@"; do
        sets=${DATASETS:-dm tissuenet isic xray} seeds=${SEEDS:-0 1 2 3 4}
        [[ $part != classify ]] || sets=${DATASETS:-isic xray}
        [[ $part != drone ]] || sets=drone seeds=${SEEDS:-0 1 2}
        for dataset in $sets; do
            [[ -f data/$dataset/meta.json || " ${DATASETS:-} " == *" $dataset "* ||
                -n ${DRY_RUN:-} && ! -d data ]] || continue
            for seed in $seeds; do
                for backbone in ${BACKBONES:-resnet50 vit_small}; do
                    on="--dataset $dataset --backbone $backbone --seed $seed"
                    [[ $part/$backbone != drone/vit_small ]] || continue
                    [[ $part == classify ]] || echo "finetune_eval.py $on --protocol reference"
                    $part
                done
            done
        done
    done | awk -F'|' -v k="${SHARD%/*}" -v n="${SHARD#*/}" '
        !($1 in line) { run[++runs] = line[$1] = $1 }
        NF > 1 && !seen[$0]++ { line[$1] = line[$1] "|" $2 }
        END { for (i = k + 0; i <= runs; i += n) print line[run[i]] }'
}

setup() {
    PYTHON=python3
    $PYTHON -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die 'Python >= 3.10 is needed'
    $PYTHON -m pip --isolated install --dry-run --no-index -r requirements.txt &>/dev/null && return
    [[ -x .venv/bin/python ]] || $PYTHON -m venv .venv
    PYTHON=.venv/bin/python                 # matplotlib, if it is there, draws the report's charts
    $PYTHON -m pip install --quiet -r requirements.txt matplotlib
}

# output_of COMMAND: the last file that it writes, by the two scripts' rules of names.
output_of() {
    local on='--dataset ([^ ]+) --backbone ([^ ]+) --seed ([0-9]+)'
    sed -E "s, --epochs 50( |$),\1,; s, --labels 1\.0( |$),\1,; s, --(train|threshold|loss) ,-,g
        s, --epochs ,-e,; s, --batch-size ,-b,; s, --labels ,-l,; s, --refine,+,
        s,pretrain.py $on(.*),runs/\1/\2/medsass\4/seed\3/samples.png,
        s,medsass --method ,,
        s,finetune_eval.py --run runs/([^ ]+) --protocol (.*),results/\1/\2.json,
        s,finetune_eval.py $on --protocol ([a-z]+)(.*),results/\1/\2/\4/seed\3/\4\5.json," <<<"$1"
}

# job NUMBER|LINE of the plan: what is older than its source is made again.
job() {
    local command flags fields output source log gpus=(${GPUS:-})
    [[ -z ${GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT]}
    IFS='|' read -r -a fields <<<"$1"
    read -r _ _ source _ <<<"${fields[1]}"
    source=data/$source/meta.json
    for flags in "${fields[@]:1}"; do
        command=$flags
        [[ $flags != --* ]] || command="finetune_eval.py --run ${source%/*} $flags"
        output=$(output_of "$command") log=results/logs/${command//[ \/]/_}.log
        if [[ ! $output -nt $source ]]; then
            echo "[${fields[0]}] python $command" >&2
            $PYTHON $command >"$log" 2>&1 || {
                printf 'failed: python %s\n    log: %s\n' "$command" "$log" >>"$FAILED"
                [[ $flags == --* ]] || return 0 # nothing can be made of it
            }
        fi
        [[ $output != runs/* ]] || source=$output
    done
}

# benchmark PLAN: run what is missing of it, and write the report.
benchmark() {
    local code=0 jobs=${JOBS:-1} name
    [[ -n $1 ]] || exec echo 'nothing to run: see python prepare_data.py --help for data'
    [[ -z ${DRY_RUN:-} ]] ||
        exec sed 's/^[a-z]/python &/' <<<"${1//|/$'\n'    python finetune_eval.py --run RUN }"
    setup
    for name in $(cut -d ' ' -f 3 <<<"$1" | sort -u); do
        [[ $name != demo || -d data/demo ]] || $PYTHON prepare_data.py --dataset demo
        [[ -f data/$name/test_masks.npy ]] || die "data/$name is not prepared, or has no masks"
    done
    [[ -z ${GPUS:-} ]] || jobs=$(wc -w <<<"$GPUS")
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + jobs - 1) / jobs))}
    mkdir -p results/logs
    export PYTHON FAILED=results/logs/failed-$HOSTNAME-$$
    trap 'rm -f "$FAILED"' EXIT
    set -m                                  # a process group of its own, to be stopped as one
    awk -v n="$(wc -l <<<"$1")" '{ print NR "/" n "|" $0 }' <<<"$1" | tr '\n' '\0' |
        xargs -0 -n 1 -P "$jobs" ${GPUS:+--process-slot-var=SLOT} "$BASH" run_all.sh job &
    group=$(jobs -p %%)
    set +m
    trap 'kill -- "-$group"; echo "stopped; the same command goes on" >&2; exit 130' INT TERM HUP
    wait $! || code=1
    cat "$FAILED" >&2 2>/dev/null && code=1
    $PYTHON finetune_eval.py --report || code=1
    return $code
}

demo() {
    local on='--dataset demo --backbone resnet50 --seed 0' few="--labels 0.1 --epochs ${EPOCHS:-10}"
    local epochs=${EPOCHS:-16} use='|--protocol'
    JOBS=${JOBS:-2} benchmark "\
pretrain.py $on --refine --epochs $epochs$use transfer$use semi $few$use finetune $few
pretrain.py $on --epochs $epochs$use transfer
finetune_eval.py $on --protocol reference
finetune_eval.py $on --protocol supervised $few"
    mkdir -p predictions/pictures
    $PYTHON -c 'import numpy, PIL.Image
for k, image in enumerate(numpy.load("data/demo/test_images.npy")[:4]):
    PIL.Image.fromarray(image).save(f"predictions/pictures/{k}.png")'
    $PYTHON finetune_eval.py --overwrite \
        --run "$(dirname "$(output_of "pretrain.py $on --refine --epochs $epochs")")" \
        --predict predictions/pictures --out predictions/masks --overlay
    echo "table: results/README.md; chart: results/demo.png; masks: predictions/masks"
}

tests() {                                   # OPTIONS of pytest
    setup
    $PYTHON -m pip install --quiet pytest pytest-xdist segmentation-models-pytorch scikit-image \
        scikit-learn lightly matplotlib tifffile pydicom
    $PYTHON -m pytest -q -o markers=$'bench\nsmoke' -o tmp_path_retention_policy=none "$@" \
        test_smoke.py
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
