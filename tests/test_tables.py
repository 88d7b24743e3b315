"""Tables in Markdown: the letters of columns, and the two forms of the line below the head."""

from spattn_olmoe.tables import table


def test_the_last_letter_holds_for_all_columns_that_follow():
    head, body = ["a", "", "c"], [["1", "2", "3"], ["", "5", "6"]]
    lines = ["| a |  | c |", "| --- | ---: | ---: |", "| 1 | 2 | 3 |", "|  | 5 | 6 |"]
    assert table(head, body).splitlines() == lines
    for columns, rule in {
        "l": "| --- | --- | --- |",
        "llr": "| --- | --- | ---: |",
        "rl": "| ---: | --- | --- |",
    }.items():
        assert table(head, body, columns).splitlines() == [lines[0], rule, *lines[2:]]
    assert table(head, iter(body), "rlr", tight=True).splitlines() == [lines[0], "|---:|---|---:|", *lines[2:]]
    assert table(["a"], []) == "| a |\n| --- |"
