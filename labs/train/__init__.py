"""Train the GPT on the standard library's source, by any strategy of ``parallel``.

    torchrun --nproc-per-node 2 -m labs.train --strategy fsdp --backend shm --steps 20

``options.py`` what can be asked for, ``strategies.py`` how each strategy is applied to the model, ``loop.py``
the steps with what is counted of them, ``__main__.py`` the command.
"""
