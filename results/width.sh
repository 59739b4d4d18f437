#!/bin/sh
# What a cut of the width costs a trained BERT shape, by each method, before any healing.
# make results WORK=width DATA=FOLDER
set -eu
text=$DATA/reviews-ko.text.txt.gz valid=$DATA/reviews-ko.valid.tsv.gz
test -d tok-reviews || lathe tokenizer tok-reviews --from "$text" vocab_size=16384 convention=bert
lathe train "$CONFIGS/bert.yaml" data.train="$text" data.validation="$valid" --resume
python "$CONFIGS/width.py" bert/checkpoints/best --text "$text" --held "$valid" --held-field document \
	--objective '{"name": "masked", "rate": 0.2}' --tokens 24000 --held-tokens 20000 --length 128 \
	--methods rotate,select,truncate --refit both --out width-bert
cat width-bert.md
