"""The plain way to serve a model: a FastAPI endpoint around transformers' pipeline.

python pipeline_server.py RUN_FOLDER PORT
"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
classify = pipeline("text-classification", model=sys.argv[1], top_k=None)


class Request(BaseModel):
    inputs: str


@app.post("/predict")
def predict(request: Request):
    return classify(request.inputs, truncation=True)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False)
