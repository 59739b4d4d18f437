#!/bin/sh
# A causal Llama shape on Korean reviews and English prose, beside a 5-gram model, in bits per byte.
# make results WORK=language DATA=FOLDER
set -eu
reviews=$DATA/reviews-ko.text.txt.gz peps=$DATA/peps-en.train.jsonl.gz
reviews_valid=$DATA/reviews-ko.valid.tsv.gz peps_valid=$DATA/peps-en.valid.jsonl.gz
test -d tok-mixed ||
	lathe tokenizer tok-mixed --from "$reviews" --from "$peps" vocab_size=8000 convention=llama
lathe train "$CONFIGS/llama.yaml" --resume data.train="[$reviews,$peps]" \
	data.validation="$reviews_valid" data.validation_fields.text=document
lathe evaluate llama/checkpoints/best data.length=256 data.fields.text=document --data "$reviews_valid" --json
lathe evaluate llama/checkpoints/best data.length=256 --data "$peps_valid" --json
python "$CONFIGS/ngram.py" --tokenizer tok-mixed --train "$reviews" --train "$peps" \
	--valid "$reviews_valid:document" --valid "$peps_valid"
