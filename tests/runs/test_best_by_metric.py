"""The best checkpoints, where only a part is said of what they are the best by."""

from __future__ import annotations

import pytest
from helpers import names, save_weight

from ckptavg import open_run
from ckptavg.errors import RunError, UsageError
from ckptavg.runs.best import derive_mode


@pytest.mark.parametrize(
    ("mode", "metrics"),
    [
        (
            "max",
            "acc val_acc valAcc top1 top5 Acc@1 acc1 prec@1 eval/accuracy val.f1_macro roc_auc "
            "AUROC mAP mAP50 box_ap val_mIoU mean_iou dice_coef bleu4 sacreBLEU_bleu R2 r2_score "
            "psnr val/ssim rougeL_rouge mcc hits@10 mrr ndcg@5 f1_score inception_score "
            "reward_mean neg_mean_squared_error_mse neg_log_loss log_likelihood fitness "
            "best_val_acc metrics.val.accuracy loss.accuracy",
        ),
        (
            "min",
            "loss val_loss valLoss train/loss eval_loss metrics.val.loss nll val_nll test_error "
            "err top1_err top5_error iou_loss dice_loss accuracy_loss perplexity ppl wer val_cer "
            "mae rmse MSE val_mape fid kid lpips brier_score ece bpc negative_log_likelihood "
            "best_loss accuracy.loss cost",
        ),
        (None, "sharpness gradient_norm metric monitor acc_rmse temperature"),
    ],
)
def test_derive_mode_knows_common_metrics(mode, metrics):
    names = metrics.split()
    assert {name: derive_mode(name) for name in names} == dict.fromkeys(names, mode)


def recorded(directory, **columns):
    for i, values in enumerate(zip(*columns.values(), strict=True), 1):
        save_weight(directory / f"epoch_{i}.pt", i, **dict(zip(columns, values, strict=True)))
    return open_run(directory)


def test_best_derives_mode_from_metric(tmp_path):
    run = recorded(tmp_path, val_acc=[0.3, 0.9, 0.6], val_loss=[0.5, 0.7, 0.2])
    assert names(run.best(2, "val_acc")) == ["epoch_2.pt", "epoch_3.pt"]
    assert names(run.best(2, "val_loss")) == ["epoch_1.pt", "epoch_3.pt"]
    assert names(run.best(1, "val_acc", "min")) == ["epoch_1.pt"]


def test_best_takes_only_metric_by_default(tmp_path):
    run = recorded(tmp_path, wer=[0.3, 0.1, 0.2]).best(2)
    assert names(run) == ["epoch_2.pt", "epoch_3.pt"]
    assert run.notes[-1] == "the best 2 are those with the lowest wer"


def test_best_needs_metric_where_several_are_recorded(tmp_path):
    run = recorded(tmp_path, acc=[0.3, 0.1], loss=[0.5, 0.7])
    with pytest.raises(UsageError, match=r"by which metric.*acc, loss.*Name the metric"):
        run.best(1)


def test_best_needs_mode_for_unknown_metric(tmp_path):
    run = recorded(tmp_path, metric=[0.3, 0.1])
    with pytest.raises(UsageError, match=r"'metric' does not tell which.*max or min"):
        run.best(1)
    assert names(run.best(1, mode="min")) == ["epoch_2.pt"]


def test_best_refuses_run_without_metrics(tmp_path):
    save_weight(tmp_path / "epoch_1.pt")
    with pytest.raises(RunError, match="record no metric"):
        open_run(tmp_path).best(1)
