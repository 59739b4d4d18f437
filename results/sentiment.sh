#!/bin/sh
# Korean review sentiment from nothing: a tokenizer, two pretrained encoders, each fine-tuned, beside TF-IDF.
# make results WORK=sentiment DATA=FOLDER
set -eu
text=$DATA/reviews-ko.text.txt.gz train=$DATA/reviews-ko.train.tsv.gz valid=$DATA/reviews-ko.valid.tsv.gz
test -d tok-reviews || lathe tokenizer tok-reviews --from "$text" vocab_size=16384 convention=bert
for shape in bert albert; do
	lathe train "$CONFIGS/$shape.yaml" data.train="$text" data.validation="$valid" --resume
	lathe train "$CONFIGS/sentiment.yaml" model=$shape/checkpoints/last out=sentiment-$shape \
		data.train="$train" data.validation="$valid" --resume
	lathe evaluate sentiment-$shape/checkpoints/best objective=classification objective.max_length=128 \
		data.fields.text=document --data "$valid" --json
done
python "$CONFIGS/tfidf.py" --train "$train" --valid "$valid"
