"""`koff report`: a page about finished runs, made from what their folders hold.

``runs`` reads the folders, ``sections`` decides what a page says, ``html`` and ``markdown`` write
it with the charts of ``svg`` and ``png``. None of it loads a model.
"""
