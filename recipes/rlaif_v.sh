#!/bin/sh
# RLAIF-V end to end: rounds of answers, claims, pairs and DPO. Each round's policy answers in the next one and is its reference.
#
#   sh recipes/rlaif_v.sh                              # the embedded world, tens of minutes on two CPU cores
#   DATA=prompts-ROUND.json IMAGES=photos EVALUATION=evaluation.yaml sh recipes/rlaif_v.sh configs/datagen/rlaif_v.yaml \
#       configs/recipes/train_preference_rlaif_v.yaml runs/llava
#
# The model is the one that the first config names as `model`; the second is one of train_preference.
# ROUNDS: 4, as published. DATA: prompts, ROUND in it stands for the number of the round (published: about 4,000 new ones each).
# IMAGES: folder that their picture paths start from.
# LABELLER: on the embedded world, the folder of the labeller. One that is not there is trained first, with
# `prefalign scenes labeller` (a minute and a half of one core).
# PROMPTS: prompts of a round on the embedded world. EVALUATION: a config of evaluate_model, such as a copy of
# configs/recipes/evaluate_files.yaml that names your files. PAIR_SETTINGS, TRAINING_SETTINGS, EVALUATION_SETTINGS: more settings of
# each step, such as "--trainer.max_steps 20".
# Started again after an interruption it goes on where it stopped. Not done here: the authors go on from the best of 16 checkpoints
# of a round by Object HalBench and MMHal; this takes the last.
set -eu

config=${1:-configs/datagen/rlaif_v_scenes.yaml}
output=${3:-runs/rlaif_v}
. "$(dirname "$0")/base_model.sh" # sets file and base
if [ $# -gt 3 ]; then
    shift 3
    echo "$0: $* is for no step. Give settings as PAIR_SETTINGS, TRAINING_SETTINGS or EVALUATION_SETTINGS." >&2
    exit 2
fi

if [ "$base" = scenes ]; then
    training=${2:-configs/recipes/train_preference_scenes.yaml}
    evaluation=${EVALUATION:-configs/recipes/evaluate_scenes.yaml}
    prompts=${PROMPTS:-256}
    labeller=${LABELLER:-runs/scenes/labeller}
    [ -f "$labeller/README.md" ] || prefalign scenes labeller --output "$labeller"
    PAIR_SETTINGS="--labeller.model_name_or_path $labeller ${PAIR_SETTINGS:-}"
else
    training=${2:-configs/recipes/train_preference_rlaif_v.yaml}
    evaluation=${EVALUATION:-}
    if [ -z "${DATA:-}" ]; then
        echo "$0: DATA is not set, so there are no prompts for $base. Give a file or folder, as in DATA=prompts-ROUND.json." >&2
        exit 2
    fi
    if [ -z "$evaluation" ]; then
        echo "$0: EVALUATION is not set, and the pictures of the embedded world say little of $base. Give a config of evaluate_model:" \
            "a copy of configs/recipes/evaluate_files.yaml that names your files." >&2
        exit 2
    fi
    prefalign path "$evaluation" >/dev/null # days before it is read
fi

policy=$base
round=1
while [ "$round" -le "${ROUNDS:-4}" ]; do
    folder=$output/round-$round
    if [ -n "${DATA:-}" ]; then
        data=$(echo "$DATA" | sed "s/ROUND/$round/g")
    else
        data=$folder/prompts
        prefalign scenes export --output "$data" --split train_fair --kind caption --start $(((round - 1) * prompts)) \
            --stop $((round * prompts))
    fi
    # shellcheck disable=SC2086
    prefalign run rlaif_v --config "$config" --model.model_name_or_path "$policy" --data.path "$data" \
        ${IMAGES:+--data.images "$IMAGES"} --output.path "$folder/pairs" --seed "$round" ${PAIR_SETTINGS:-}
    # shellcheck disable=SC2086
    prefalign run train_preference --config "$training" --model.model_name_or_path "$policy" --pairs "$folder/pairs" \
        --output "$folder/policy" ${TRAINING_SETTINGS:-}
    policy=$folder/policy
    if [ -f "$policy/adapter_config.json" ]; then # the next round trains an adapter of its own, against this policy
        [ -d "$folder/merged" ] || prefalign run merge_adapter --config configs/recipes/merge_adapter.yaml --adapter "$policy" \
            --output "$folder/merged"
        policy=$folder/merged
    fi
    round=$((round + 1))
done

# shellcheck disable=SC2086
prefalign run evaluate_model --config "$evaluation" --model.model_name_or_path "$base" --output "$output/evaluation/base" \
    ${EVALUATION_SETTINGS:-}
# shellcheck disable=SC2086
prefalign run evaluate_model --config "$evaluation" --model.model_name_or_path "$policy" --baseline "$output/evaluation/base" \
    --output "$output/evaluation/policy" ${EVALUATION_SETTINGS:-}
