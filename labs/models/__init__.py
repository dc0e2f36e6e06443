"""The models that the labs train and serve, and the text they are trained on.

A GPT whose options reach from GPT-2 to Llama (``gpt.py``) and the encoder-decoder of 2017 from the same parts
(``encoder_decoder.py``). They are plain modules that know nothing of parallelism: it is applied from outside.
"""
