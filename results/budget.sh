#!/bin/sh
# Half of the parameters: the budget's plan beside every single axis; of every parent that the other works left here.
# make results WORK=budget DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
text=$DATA/reviews-ko.text.txt.gz valid=$DATA/reviews-ko.valid.tsv.gz
docs=$DATA/docs-en-ko.train.jsonl.gz docs_valid=$DATA/docs-en-ko.valid.jsonl.gz
for run in $(parents); do
	case $run in
	t5) # one of its three tasks
		set -- --calibrate "$docs" --data "$docs_valid"
		for each in calibrate data; do
			set -- "$@" "$each.source=en" "$each.target=ko" "$each.prefix=translate English to Korean: "
		done
		;;
	*) set -- --calibrate "$text" --data "$valid" data.field=document ;;
	esac
	python "$CONFIGS/budget.py" "$run/checkpoints/last" "$@" calibrate.tokens=24000 data.tokens=20000 > "budget-$run.md"
	cat "budget-$run.md"
done
