"""A model of bert-base's shape with random weights, for measuring speed: python base_model.py MINILM_FOLDER OUT."""

import sys

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(2021)
BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
