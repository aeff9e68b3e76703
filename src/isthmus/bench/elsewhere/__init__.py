"""The round of `isthmus bench rivals` in other libraries; each file is a program of its own.

A program is given an .npz with the work (the clients' items, the first weights, the settings). It
reads numbers from its standard input, plays so many rounds, and answers each with a line of JSON:
the `seconds` they took, the `accuracy` of the weights on the test items, and how far the weights
have `moved` from the first ones (the norm of all together). Programs for
libraries of other environments import nothing from here, so that no package of this one is seen.
"""
