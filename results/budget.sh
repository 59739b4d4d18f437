#!/bin/sh
# Half of the parameters: the budget's plan beside every single axis; of every parent that the other works left here.
# make results WORK=budget DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents); do
	case $run in
	t5)
		text=$DATA/docs-en-ko.train.jsonl.gz valid=$DATA/docs-en-ko.valid.jsonl.gz
		set -- "calibrate.prefix=translate English to Korean: " calibrate.source=en calibrate.target=ko \
			"data.prefix=translate English to Korean: " data.source=en data.target=ko
		;;
	*)
		text=$DATA/reviews-ko.text.txt.gz valid=$DATA/reviews-ko.valid.tsv.gz
		set -- data.field=document
		;;
	esac
	python "$CONFIGS/budget.py" "$run/checkpoints/last" --calibrate "$text" --data "$valid" "$@" \
		calibrate.tokens=24000 data.tokens=20000 > "budget-$run.md"
	cat "budget-$run.md"
done
