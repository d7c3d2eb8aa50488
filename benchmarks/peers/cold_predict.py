"""The five lines by which most people label one text: python cold_predict.py RUN_FOLDER TEXT."""

import json
import sys

from transformers import pipeline

classify = pipeline("text-classification", model=sys.argv[1])
print(json.dumps(classify(sys.argv[2])[0]))
