#!/bin/sh
# Fact-RLHF end to end (arXiv 2309.14525): SFT -> a reward model that reads facts -> PPO on it, one base for all of them.
#
#   sh recipes/fact_rlhf.sh                                             # the embedded world, minutes on two CPU cores
#   PAIRS=runs/pairs HELD_OUT=runs/held_out PROMPTS=runs/prompts \
#       sh recipes/fact_rlhf.sh configs/recipes/train_ppo_fact_rlhf.yaml runs/llava
#
# The model is the one that the PPO config names. On a real checkpoint PAIRS is a folder of pairs (with facts), PROMPTS one of
# prompts, HELD_OUT pairs that the reward model is graded on; SFT and REWARD are the configs of the steps before, SFT_SETTINGS and
# REWARD_SETTINGS more settings of theirs. More arguments go to PPO. Started again it goes on where it stopped.
set -eu

config=${1:-configs/recipes/train_ppo_fact_rlhf_scenes.yaml}
output=${2:-runs/fact_rlhf}
[ $# -ge 1 ] && shift
[ $# -ge 1 ] && shift
. "$(dirname "$0")/base_model.sh" # sets file and base

if [ "$base" = scenes ]; then
    sft=${SFT:-configs/recipes/train_sft_scenes.yaml}
    reward=${REWARD:-configs/reward_models/train_reward_model_scenes.yaml}
    rows=${ROWS:-1536}
    prompts=$output/prompts
    pairs=$output/pairs
    prefalign scenes export --output "$prompts" --split train_fair --kind caption --regime fair --start 0 --stop "$rows"
    prefalign run povid --config configs/datagen/povid_scenes.yaml --data.path "$prompts" --output.path "$pairs"
    held_out=$output/held_out
    prefalign scenes export --output "$output/held_out_prompts" --split val_fair --kind caption --start 0 --stop "${HELD_OUT_ROWS:-256}"
    prefalign run povid --config configs/datagen/povid_scenes.yaml --data.path "$output/held_out_prompts" --output.path "$held_out"
    lora="--lora.r 16 --lora.alpha 32"
    eval_pairs=
else
    sft=${SFT:-configs/recipes/train_sft.yaml}
    reward=${REWARD:-configs/reward_models/train_reward_model.yaml}
    prompts=${PROMPTS:?name a folder of prompts}
    pairs=${PAIRS:?name a folder of pairs with facts}
    held_out=${HELD_OUT:?name a folder of pairs that the reward model is graded on}
    lora=
    eval_pairs=$held_out
fi

# shellcheck disable=SC2086
prefalign run train_sft --config "$sft" --model.model_name_or_path "$base" --data "$pairs" --output "$output/sft" \
    ${SFT_SETTINGS:-}
start=$output/sft
if [ -f "$output/sft/adapter_config.json" ]; then  # policy and reward model are adapters of the merged model
    start=$output/sft_merged
    prefalign run merge_adapter --adapter "$output/sft" --output "$start"
fi
# shellcheck disable=SC2086
prefalign run train_reward_model --config "$reward" --model.model_name_or_path "$start" --pairs "$pairs" \
    ${eval_pairs:+--eval_pairs "$eval_pairs"} --output "$output/reward" $lora ${REWARD_SETTINGS:-}
prefalign run grade_reward_model --rewards "[{name: reward_model, path: $output/reward}]" \
    --sets "{held_out: {path: $held_out}}" --output "$output/grade"
prefalign run train_ppo --config "$config" --model.model_name_or_path "$start" --prompts "$prompts" \
    --reward_model "$output/reward" --output "$output/ppo" "$@"
