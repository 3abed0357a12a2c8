"""Records of what lmmono offers, by name: plain dicts of data that import nothing heavy.

A record says what a thing is, what it needs and cites, and where it lives: its `home` is a string
`package.module:function`, imported by `lookup.load` when it is used. So recipes, `lmmono check` and
help know every name without the code behind it, and a new scorer, explainer, learner, family, suite
or task is one file and one record here.
"""
