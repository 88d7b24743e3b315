"""Tables in Markdown: the letters of columns and the line below the head."""

from spattn_olmoe.tables import context_label, interval, p_value, plus_minus, table


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
    assert table(head, iter(body), "rlr").splitlines() == [lines[0], "| ---: | --- | ---: |", *lines[2:]]
    assert table(["a"], []) == "| a |\n| --- |"


def test_numbers_are_written_alike_everywhere():
    assert [plus_minus(0.49562, 0.014), plus_minus(0.5, None)] == ["0.4956 +- 0.0140", "0.5000"]
    assert interval((-0.0708, 0.1065)) == "-0.0708 to +0.1065"
    assert [p_value(0.00061), p_value(0.00009)] == ["0.0006", "< 0.0001"]
    assert [context_label(c) for c in ([1, 256], [1, 16], [16, 32])] == ["all", "1 to 15", "16 to 31"]
