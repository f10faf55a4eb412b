#!/bin/sh
# Mixed DPO end to end: prompts -> stored BDHS pairs -> rounds that take half of the prompts from these -> measured.
#
#   sh recipes/mixed_dpo.sh                                                # the embedded world, minutes on two CPU cores
#   sh recipes/mixed_dpo.sh configs/recipes/train_online.yaml runs/llava   # a real checkpoint: its prompts are the config's
#
# PAIRS: a config of the stage that makes the offline pairs, any of datagen/ (default: bdhs). EVALUATION: as in online_dpo.sh.
set -eu

config=${1:-configs/recipes/train_online_mixed_scenes.yaml}
output=${2:-runs/mixed_dpo}
[ $# -ge 1 ] && shift
[ $# -ge 1 ] && shift
file=$(prefalign path "$config")
base=$(sed -n 's/^  model_name_or_path: *\([^ ]*\).*/\1/p' "$file" | head -n 1)

if [ "$base" = scenes ]; then
    pairs=${PAIRS:-configs/datagen/bdhs_scenes.yaml}
    prompts=$output/scenes
    prefalign scenes export --output "$prompts" --split train_fair --kind caption --stop "${PROMPTS:-1536}"
else
    pairs=${PAIRS:-configs/datagen/bdhs.yaml}
    prompts=$(sed -n 's/^  path: *\([^ ]*\).*/\1/p' "$file" | head -n 1)
fi
stage=$(basename "$pairs" .yaml)
prefalign run "${stage%_scenes}" --config "$pairs" --model.model_name_or_path "$base" --data.path "$prompts" \
    --output.path "$output/pairs"
sh "$(dirname "$0")/online_dpo.sh" "$config" "$output" --offline "$output/pairs" "$@"
