"""Stage 2: the ratio, what the gradient favours, resume, samplers and objectives, the stop rule."""

import shutil
import weakref

import pytest
import torch

from ldo.core.checkpoint import load_checkpoint
from ldo.core.errors import TrainingError
from ldo.core.files import read_json_lines
from ldo.method import critic
from ldo.method import guards as guards_of
from ldo.method.critic import score_clips
from ldo.method.guards import guard_penalties, motion
from ldo.method.rollout import decode_videos
from ldo.models.lora import read_lora, restore_values
from ldo.sandbox.exact import exact_metrics
from ldo.stages import align, collect, reinforce
from ldo.stages.align import clip_losses, make_alignment, train_align
from ldo.stages.collect import collect_rollout, judge_videos, video_latent_shape
from ldo.stages.policy_losses import Policies, micro_losses
from ldo.stages.reinforce import finished_align_state, learn_from_rollout, train_reinforce
from tests.helpers.interrupt import interrupted

ONLY = {"stages": ["reinforce"]}
PAIRS = {"rl__group_size": 2}  # where a test does not ask what a group is


@pytest.mark.parametrize("objective", ["grpo", "nft", "awm"])
@pytest.mark.parametrize("sampler", ["flow", "dance", "cps"])
def test_every_sampler_and_objective_trains(open_run, objective, sampler):
    run = open_run(**ONLY, rl__sampler=sampler, rl__objective=objective, rl__eta=0.6, rl__updates=2, **PAIRS)
    values = train_reinforce(run)
    rows = read_json_lines(run.folder / "reinforce.jsonl")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert any((value != run.fresh[name]).any() for name, value in values.items())


@pytest.mark.parametrize("guard", [False, True])
def test_ratio_is_one_before_the_first_update_and_not_after(open_run, guard):
    run = open_run(**ONLY, rl__guard=guard)
    rollout, _ = collect_rollout(run, 0, run.fresh)
    ratios = [loss.ratio for loss in micro_losses(run, rollout, rollout.groups, 0, Policies(None, run.fresh))]
    assert len(ratios) == 4 and all((ratio == 1).all() for ratio in ratios)
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.add_(0.05)
    assert all(
        (loss.ratio != 1).any() for loss in micro_losses(run, rollout, rollout.groups, 0, Policies(None, run.fresh))
    )


def test_a_rollout_that_update_does_not_repeat_is_caught(open_run, monkeypatch):
    run = open_run(**ONLY)

    def other_weights(*args):
        found = collect_rollout(*args)
        with torch.no_grad():
            next(iter(run.parameters.values())).add_(0.1)
            list(run.parameters.values())[1].add_(0.1)
        return found

    monkeypatch.setattr(reinforce, "collect_rollout", other_weights)
    with pytest.raises(TrainingError, match="ratio is off 1"):
        train_reinforce(run)


def test_reward_that_can_be_learnt_is_learnt(open_run, monkeypatch):
    """A critic that likes red gets redder videos, by several times what they differ within a group."""

    def red(judge, frames, config, fps=0.0):
        value = 1000 * frames[:, :, 0].flatten(1).mean(1)
        return critic.Score(value, value, value)

    monkeypatch.setattr(collect, "score_clips", red)
    free = dict(critic__motion_weight=0.0, critic__sharpness_weight=0.0, rl__kl=0.0, rl__guard_clip=1.0)
    run = open_run(**ONLY, **free, rl__updates=12, rl__lr=1e-2, rl__group_size=8, rl__window=3, rl__eta=1.0)
    train_reinforce(run)
    rows = read_json_lines(run.folder / "reinforce.jsonl")
    assert rows[-1]["reward"] > rows[0]["reward"] + 3 * rows[0]["reward_std"]


def test_divergence_is_logged_and_grows_from_zero(open_run):
    run = open_run(**ONLY, rl__updates=3)
    train_reinforce(run)
    divergences = [row["kl"] for row in read_json_lines(run.folder / "reinforce.jsonl")]
    assert divergences[0] < divergences[-1]


@pytest.mark.parametrize("objective, projector", [("grpo", "none"), ("grpo", "mlp"), ("nft", "none")])
def test_resume_is_bitwise(open_run, objective, projector):
    changes = {
        "rl__objective": objective,
        "rl__window_range": 2,
        "rl__align_weight": 0.1,
        "rl__flow_weight": 0.1,
        "align__steps": 2,
    }
    changes |= {"teacher__projector": projector, **PAIRS}
    whole = open_run(**changes)
    train_align(whole, "align")
    checkpoint = whole.checkpoint("align").read_bytes()
    expected = train_reinforce(whole)
    log = (whole.folder / "reinforce.jsonl").read_text()
    shutil.rmtree(whole.folder)
    whole.checkpoint("align").parent.mkdir(parents=True)
    whole.checkpoint("align").write_bytes(checkpoint)

    # in update 3, past the checkpoint at 2
    with interrupted(reinforce, "learn_from_rollout", 4):
        train_reinforce(open_run(**changes))
    found = train_reinforce(open_run(**changes))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (whole.folder / "reinforce.jsonl").read_text() == log


def test_continues_from_stage_one_and_needs_it(open_run):
    run = open_run()
    with pytest.raises(TrainingError, match="stage 2 needs"):
        finished_align_state(run)
    aligned = train_align(run, "align")
    restore_values(run.parameters, run.fresh)
    assert all(
        torch.equal(value, aligned[name])
        for name, value in reinforce.start_values(run, finished_align_state(run)).items()
    )
    alone = open_run(**ONLY)
    assert reinforce.start_values(alone, finished_align_state(alone)) is alone.fresh


def test_projector_is_stage_ones_and_stays_as_it_was(open_run, monkeypatch):
    run = open_run(teacher__projector="mlp", rl__align_weight=0.1, align__steps=2, rl__updates=2)
    fresh = make_alignment(run).state_dict()
    train_align(run, "align")
    trained = load_checkpoint(run.checkpoint("align"))["aligner"]
    assert fresh.keys() == trained.keys() and all((fresh[name] != value).any() for name, value in trained.items())

    used = []

    def watched(run, aligner, *rest):
        used.append((aligner, {name: value.clone() for name, value in aligner.state_dict().items()}))
        return clip_losses(run, aligner, *rest)

    monkeypatch.setattr(align, "clip_losses", watched)
    train_reinforce(run)
    # built once, for two updates of two steps
    assert len(used) == 4 and len({id(aligner) for aligner, _ in used}) == 1
    # after the last step
    used.append((used[0][0], used[0][0].state_dict()))
    assert all(torch.equal(values[name], value) for _, values in used for name, value in trained.items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in used[0][0].parameters())


@pytest.mark.parametrize("weights, teaches", [({"rl__align_weight": 0.1}, True), ({"rl__flow_weight": 0.1}, False)])
def test_the_teacher_is_asked_only_where_it_weighs(open_run, monkeypatch, weights, teaches):
    run = open_run(**ONLY, **weights, rl__updates=1)
    seen = []
    monkeypatch.setattr(
        align,
        "clip_losses",
        lambda run, aligner, *rest: seen.append(aligner is not None) or clip_losses(run, aligner, *rest),
    )
    train_reinforce(run)
    assert seen == [teaches] * 2


def gradients_of(parameters):
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("objective", ["grpo", "nft", "awm"])
def test_micro_batches_change_no_update_but_by_rounding(open_run, objective):
    """Half a group a forward pass: the same rollouts, advantages and gradients, and a ratio of 1, which is asserted."""
    rewards, gradients = [], []
    for micro_size in (0, 2):
        run = open_run(**ONLY, rl__objective=objective, rl__micro_batch=micro_size, rl__updates=1, rl__minibatches=1)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                reinforce,
                "optimizer_step",
                lambda _optimizer, trained, *_, seen=seen: seen.append(gradients_of(trained)) or 0.0,
            )
            rollout, metrics = collect_rollout(run, 0, run.fresh)
            learn_from_rollout(run, rollout, 0, torch.optim.SGD(list(run.parameters.values()), 0.1), run.fresh)
        rewards.append(metrics["reward"])
        gradients.append(torch.cat([gradient.flatten() for gradient in seen[0]]))
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5) and gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_guidance_and_unshared_noise(open_run):
    run = open_run(**ONLY, rl__guidance=2.0, rl__shared_noise=False, rl__updates=1)
    rollout, _ = collect_rollout(run, 0, run.fresh)
    assert not torch.equal(rollout.trajectory.x_SN[0, 0], rollout.trajectory.x_SN[0, 1])
    shared = open_run(**ONLY, rl__updates=1)
    rollout, _ = collect_rollout(shared, 0, shared.fresh)
    assert torch.equal(rollout.trajectory.x_SN[0, 0], rollout.trajectory.x_SN[0, 1])
    assert not torch.equal(rollout.trajectory.final_N[0], rollout.trajectory.final_N[1])


@pytest.mark.parametrize("micro_size", [0, 2])
def test_judging_group_by_group_is_judging_all(open_run, monkeypatch, micro_size):
    """The same bits as from all videos at once, none of which outlives its group."""
    run = open_run(**ONLY, rl__prompts=4, rl__minibatches=2, rl__micro_batch=micro_size)
    shape, together = video_latent_shape(run), micro_size or 4
    final, quiet = (torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)) for count in (16, 4))
    frames = decode_videos(run.generator, final, micro_size or 4)
    before = decode_videos(run.generator, quiet, together).repeat_interleave(4, 0)
    scores = [
        score_clips(run.world_model, part, run.recipe.critic, run.recipe.data.fps)
        for part in frames.split(micro_size or 4)
    ]
    penalties = guard_penalties(frames, before, run.recipe.critic)

    made, alive = [], []

    def watched(*args):
        alive.append([len(videos()) for videos in made if videos() is not None])
        videos = decode_videos(*args)
        made.append(weakref.ref(videos))
        return videos

    monkeypatch.setattr(collect, "decode_videos", watched)
    exact = [exact_metrics(line.text, line.extra) for line in run.prompts[:4]]
    judged = judge_videos(run, final, quiet, together, exact)
    for name in ("reward", "skill", "plain"):
        assert torch.equal(getattr(judged, name), torch.cat([getattr(score, name) for score in scores]))
    assert torch.equal(judged.penalties, penalties.values) and torch.equal(judged.weights, penalties.weights)
    assert judged.names == penalties.names
    assert torch.equal(judged.motion, motion(frames)) and torch.equal(judged.reference_motion, motion(before))
    assert judged.violations == [exact[index // 4].violates(video.numpy()) for index, video in enumerate(frames)]
    assert len(made) == 4 + 4 // together
    # at each decoding only references live
    assert all(set(lengths) <= {together} and len(lengths) <= 1 for lengths in alive)
    assert judge_videos(run, final, quiet, together, []).violations == []


def test_a_group_without_variance_is_dropped_and_counted(open_run, monkeypatch):
    calls = []

    def every_second_even(judge, frames, config, fps=0.0):
        value = torch.rand(len(frames), generator=torch.Generator().manual_seed(len(calls)))
        if len(calls) % 2:
            value = torch.ones(len(frames))
        calls.append(1)
        return critic.Score(value, value, value)

    monkeypatch.setattr(collect, "score_clips", every_second_even)
    run = open_run(**ONLY, critic__motion_weight=0.0, critic__sharpness_weight=0.0)
    rollout, metrics = collect_rollout(run, 0, run.fresh)
    assert metrics["zero_variance_groups"] == 1
    assert (rollout.advantage_N[4:] == 0).all() and (rollout.advantage_N[:4] != 0).all()
    assert len(list(micro_losses(run, rollout, rollout.groups, 0, Policies(None, run.fresh)))) == 2


def test_stops_when_motion_dies(open_run, monkeypatch, capsys):
    # asked by the guard, then for the ratio; each time for the rollout's videos, then for the reference's
    turn = iter(range(10**6))
    for module in (guards_of, collect):
        monkeypatch.setattr(module, "motion", lambda frames: torch.full((len(frames),), 1.0 if next(turn) % 2 else 0.1))
    run = open_run(**ONLY, **PAIRS, rl__updates=20)
    train_reinforce(run)
    assert len(read_json_lines(run.folder / "reinforce.jsonl")) == 5
    assert "motion fell to 0.10" in capsys.readouterr().out
    assert load_checkpoint(run.checkpoint("reinforce"))["stopped"]
    train_reinforce(open_run(**ONLY, **PAIRS, rl__updates=20))
    assert len(read_json_lines(run.folder / "reinforce.jsonl")) == 5  # it stays stopped


def test_export_is_the_average(open_run):
    run = open_run(**ONLY, rl__updates=2, rl__ema=0.5, rl__ema_every=1)
    values = train_reinforce(run)
    last = load_checkpoint(run.checkpoint("reinforce"))["lora"]
    name = max(last, key=lambda key: float((last[key] - run.fresh[key]).abs().max()))
    assert not torch.equal(values[name], last[name]) and not torch.equal(values[name], run.fresh[name])
    assert torch.equal(read_lora(run.lora_folder("ldo"))[name], values[name])
