"""Model classes that transformers lacks; each file needs only torch and transformers.

An exported folder of such a model contains the file and loads without megakd.
"""
