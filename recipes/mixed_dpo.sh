#!/bin/sh
# Mixed DPO end to end: prompts -> stored BDHS pairs -> rounds that take half of the prompts from these -> measured.
#
#   sh recipes/mixed_dpo.sh                                                # the embedded world, minutes on two CPU cores
#   sh recipes/mixed_dpo.sh configs/recipes/train_online.yaml runs/llava   # a real checkpoint: its prompts are the config's
#
# PAIRS: a config of the stage that makes the offline pairs, named after it (default: bdhs): bdhs, m3id, povid or re_align, which
# answer the prompts by the model. Pairs of other stages go to online_dpo.sh, as --offline. EVALUATION: as in online_dpo.sh.
set -eu

config=${1:-configs/recipes/train_online_mixed_scenes.yaml}
output=${2:-runs/mixed_dpo}
[ $# -ge 1 ] && shift
[ $# -ge 1 ] && shift
. "$(dirname "$0")/base_model.sh" # sets file and base

if [ "$base" = scenes ]; then
    pairs=${PAIRS:-configs/datagen/bdhs_scenes.yaml}
    prompts=$output/scenes
    images=
    prefalign scenes export --output "$prompts" --split train_fair --kind caption --stop "${PROMPTS:-1536}"
else
    pairs=${PAIRS:-configs/datagen/bdhs.yaml}
    prompts=$(prefalign path "$file" data.path)
    images=$(prefalign path "$file" data.images)
    if [ -z "$prompts" ]; then
        echo "$0: $file names no prompts. Set data.path in it." >&2
        exit 2
    fi
fi
stage=$(basename "$pairs" .yaml)
case "$stage" in
bdhs | bdhs_* | m3id | m3id_* | povid | povid_* | re_align | re_align_*) ;;
*)
    echo "$0: PAIRS is $pairs; this recipe knows configs of bdhs, m3id, povid and re_align. Make other pairs by themselves, and" \
        "give them to recipes/online_dpo.sh as --offline." >&2
    exit 2
    ;;
esac
case "$stage" in re_align*) stage=re_align ;; *) stage=${stage%%_*} ;; esac
prefalign run "$stage" --config "$pairs" --model.model_name_or_path "$base" --data.path "$prompts" \
    ${images:+--data.images "$images"} --output.path "$output/pairs"
sh "$(dirname "$0")/online_dpo.sh" "$config" "$output" --offline "$output/pairs" "$@"
