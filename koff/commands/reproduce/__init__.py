"""`koff reproduce`: does what the paper claims hold for a model? Trainings, and a page of answers.

``plan`` knows which runs that takes and the commands that make them, ``runner`` and ``display`` run
them, ``collect`` reads what they left, ``claims`` says what follows, and ``page`` shows it.
"""
