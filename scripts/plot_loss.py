"""Draw the loss curves of runs.

python scripts/plot_loss.py runs/quickstart-spattention runs/quickstart-standard --out loss.png
"""

from __future__ import annotations

from spattn_olmoe.errors import Parser, user_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", required=True, help="the picture, .png or .svg or .pdf")
    args = parser.parse_args()
    with user_errors():
        from spattn_olmoe.paper.loss_curves import plot_losses

        plot_losses(args.runs, args.out)
        print(args.out)


if __name__ == "__main__":
    main()
