"""Submit training to a cluster: checked on the login node, one job an attention type.

python scripts/launch.py --cluster configs/cluster/example_slurm.yaml --config configs/1b7b_spattn.yaml [key=value ...]
python scripts/launch.py --cluster ... --config ... --types spattention,standard --print
"""

from __future__ import annotations

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--cluster", required=True, help="a YAML file, see configs/cluster/")
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--types", help="attention types, separated by commas: a run for each")
    parser.add_argument("--print", action="store_true", help="print the jobs; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    trust.add_argument(parser)  # here and in the jobs
    args = parser.parse_intermixed_args()
    with user_errors():
        with modules_kept():
            quiet()

            from spattn_olmoe.cluster import kubernetes, slurm
            from spattn_olmoe.cluster.launch import plan_runs
            from spattn_olmoe.cluster.profile import load_profile

        profile = load_profile(args.cluster)
        scheduler = {"slurm": slurm, "kubernetes": kubernetes}[profile.kind]
        types = args.types.split(",") if args.types else []
        runs = plan_runs(profile, args.config, args.overrides, types, trusted=args.trust)
        if args.print:
            for run in runs:
                print(scheduler.job_script(profile, run))
            return
        for run in runs:  # before anything is written: the folder may be that of a job that waits
            scheduler.check_queue(run)
        scripts = [run.write(profile, scheduler.FILE, scheduler.job_script(profile, run)) for run in runs]
        for script in scripts:  # all are checked before one is submitted
            scheduler.check_job(script)
        for run, script in zip(runs, scripts, strict=True):
            print(scheduler.how_to(run, scheduler.submit(script)), flush=True)


if __name__ == "__main__":
    main()
