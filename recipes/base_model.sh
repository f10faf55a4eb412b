# Part of the recipes beside it, which source it with `config` set and their further arguments as $@.
#
# Sets `file`, where the config lies, and `base`, the model that it names for every step.

case " $* " in *" --model"*)
    echo "$0: the model is the config's, for every step of this recipe; set model.model_name_or_path in $config." >&2
    exit 2 ;;
esac
file=$(prefalign path "$config")
base=$(prefalign path "$file" model.model_name_or_path)
if [ -z "$base" ]; then
    echo "$0: $file names no model. Set model.model_name_or_path in it." >&2
    exit 2
fi
