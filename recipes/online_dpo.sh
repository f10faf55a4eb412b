#!/bin/sh
# Online DPO end to end: prompts -> rounds of sample, annotate, train -> the policy measured beside the model it started from.
#
#   sh recipes/online_dpo.sh                                               # the embedded world, minutes on two CPU cores
#   sh recipes/online_dpo.sh configs/recipes/train_online.yaml runs/llava  # a real checkpoint: its prompts are the config's
#   sh recipes/online_dpo.sh configs/recipes/train_online_scenes.yaml runs/steps --trainer.algorithm online_dpo_step
#
# EVALUATION: a config of evaluate_model (default: the embedded world; configs/recipes/evaluate_files.yaml for real pictures).
# Started again after an interruption it goes on where it stopped.
set -eu

config=${1:-configs/recipes/train_online_scenes.yaml}
output=${2:-runs/online_dpo}
[ $# -ge 1 ] && shift
[ $# -ge 1 ] && shift
. "$(dirname "$0")/base_model.sh" # sets file and base
evaluation=${EVALUATION:-configs/recipes/evaluate_scenes.yaml}

if [ "$base" = scenes ]; then
    prefalign scenes export --output "$output/scenes" --split train_fair --kind caption --stop "${PROMPTS:-1536}"
    set -- --data.path "$output/scenes" "$@"
fi
prefalign run train_online --config "$config" --output "$output/run" "$@"

policy=$output/run/policy
[ -d "$policy" ] || policy=$output/run # step by step, GRPO and RLOO save where they run
# shellcheck disable=SC2086
prefalign run evaluate_model --config "$evaluation" --model.model_name_or_path "$base" --output "$output/evaluation/base" \
    ${EVALUATION_SETTINGS:-}
# shellcheck disable=SC2086
prefalign run evaluate_model --config "$evaluation" --model.model_name_or_path "$policy" --baseline "$output/evaluation/base" \
    --output "$output/evaluation/policy" ${EVALUATION_SETTINGS:-}
