"""Between the contract and the domain.

requests.py         messages -> queries, validated field by field
responses.py        answers -> messages
filter_language.py  the text of a filter -> an expression
"""
