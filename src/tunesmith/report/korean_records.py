"""Korean of what files of runs and comparisons hold in English: names of figures, verdicts, baselines, notes.

``{name}`` in a sentence is a place that may hold another sentence; ``{n_name}`` holds a number. The first sentence that
fits is used.
"""

NAMES = {
    # figures
    "loss": "손실",
    "perplexity": "퍼플렉시티",
    "accuracy": "정확도",
    "token accuracy": "토큰 정확도",
    "f1": "F1",
    "macro f1": "매크로 F1",
    "micro f1": "마이크로 F1",
    "precision": "정밀도",
    "recall": "재현율",
    "support": "행 수",
    "f1 low": "F1 하한",
    "f1 high": "F1 상한",
    "auroc": "AUROC",
    "exact match": "완전 일치",
    "token f1": "토큰 F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "stopped": "스스로 끝낸 비율",
    "length": "길이",
    "repetition": "반복 비율",
    "distinct 1": "distinct-1",
    "distinct 2": "distinct-2",
    "calibration error": "보정 오차",
    "margin": "마진",
    "mse": "MSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "pearson": "피어슨 상관계수",
    "spearman": "스피어만 상관계수",
    "reward": "보상",
    "reward std": "보상 표준편차",
    "response length": "답변 길이",
    "kl": "KL",
    "approx kl": "KL 근사값",
    "ratio": "확률비",
    "clip fraction": "클리핑 비율",
    "policy loss": "정책 손실",
    "value loss": "가치 손실",
    "entropy": "엔트로피",
    "zero variance": "보상이 모두 같은 프롬프트 비율",
    "sampler mismatch": "샘플러와의 로그확률 차이",
    "kl per answer": "답변당 KL",
    "kl coef": "KL 계수",
    "explained variance": "설명된 분산",
    "reward after kl": "KL을 뺀 보상",
    "F1 with the reference": "정답과의 F1",
    "advantage": "어드밴티지",
    "rewards/chosen": "chosen 보상",
    "rewards/rejected": "rejected 보상",
    "rewards/accuracies": "보상 정확도",
    "rewards/margins": "보상 마진",
    "logps/chosen": "chosen 로그확률",
    "logps/rejected": "rejected 로그확률",
    "longer is better": "더 긴 답변이 나은 비율",
    "baseline": "기준선",
    "threshold": "임계값",
    "unseen": "학습에 없던 클래스",
    # columns and keys
    "figure": "지표",
    "value": "값",
    "before": "이전",
    "after": "이후",
    "change": "변화",
    "difference": "차이",
    "95% interval": "95% 구간",
    "visible from": "구별 가능한 차이",
    "model": "모델",
    "parameters": "파라미터",
    "size": "크기",
    "tokens/s": "토큰/초",
    "set": "세트",
    "rows": "행",
    "class": "클래스",
    "type": "종류",
    "words": "평균 단어 수",
    "notes": "알림",
    "command": "명령",
    "data": "데이터",
    "objective": "목적 함수",
    "tokens": "토큰",
    "tokens per second": "초당 토큰",
    "first": "첫 번째",
    "second": "두 번째",
    "second wins": "두 번째 승",
    "first wins": "첫 번째 승",
    "ties": "무승부",
    "missing": "판정 없음",
    "win rate": "승률",
    "equal length": "같은 길이일 때",
    # the examination of a judge, and its cost
    "expected": "기준",
    "prefers the answer read first": "먼저 읽은 답변을 고른 비율",
    "prefers the longer answer": "더 긴 답변을 고른 비율",
    "repeats its verdict": "같은 판정을 되풀이한 비율",
    "no verdict": "판정하지 못한 비율",
    "calls": "판정 횟수",
    "seconds": "걸린 시간",
    "reused": "재사용한 판정",
    # data
    "eval rows also in train": "학습 데이터에도 있는 평가 행",
    "from the cache": "캐시 사용",
    "prepared in": "준비 시간",
    "template": "템플릿",
    "max length": "최대 길이",
    "held out rows": "평가용으로 뗀 행",
    "eval rows that share text with train": "학습 데이터와 글이 겹치는 평가 행",
    "train": "학습",
    "eval": "평가",
    "examples": "예제",
    "supervised tokens": "학습 대상 토큰",
    "no supervised tokens": "학습 대상 토큰이 없는 예제",
    "duplicates": "중복",
    "above max length": "최대 길이 초과",
    "of these left out whole": "그중 통째로 뺀 행",
    "tokens lost by that": "잘려 나간 토큰",
    "median length": "길이 중앙값",
    "95% are at most": "95%가 이 길이 이하",
    "longest": "최대",
    "path": "경로",
    "role": "용도",
    "format": "형식",
    "read": "읽은 행",
    "kept": "쓰는 행",
    "rejected": "거부한 행",
    "weight": "가중치",
    "carriage returns": "CRLF를 LF로 읽은 행",
    "commit": "커밋",
    "evaluation row": "평가 행",
    "training row": "학습 행",
    "text": "글",
    "cpu": "CPU",
    "cores": "코어",
    "memory": "메모리",
    "the model's own chat template": "모델의 대화 템플릿",
    "none: the rows are plain text": "없음: 행이 일반 텍스트입니다",
    "too few for an interval": "구간을 구하기에 너무 적음",
    # baselines
    "always the longer answer": "항상 더 긴 답변",
    "always the shorter answer": "항상 더 짧은 답변",
    "always no answer": "항상 ‘답 없음’",
    "equal rewards": "모두 같은 보상",
    "the same for all rows": "모든 행에 같은 값",
    "the reference policy, unchanged": "학습 전 그대로의 참조 정책",
    "the frequency of each as its probability": "각 클래스의 빈도를 확률로 쓴 예측",
    "the base model": "기반 모델",
    "the prompt copied": "프롬프트 복사",
    "the most frequent answer": "가장 흔한 답변",
    # remarks
    "it takes the labels from the base, which has others": "라벨을 기반 모델에서 읽는데 서로 다릅니다",
    "the model may predict that there is none": "모델이 ‘답 없음’을 예측할 수 있습니다",
    "the model always predicts one": "모델이 항상 답을 예측합니다",
    "no entities, single tags": "개체 없음, 낱개 태그",
    "it gives every answer the same reward": "모든 답변에 같은 보상을 줍니다",
    "the same labels": "같은 라벨",
    "the same number": "같은 값",
    # comparisons
    "the tokenizers differ, so losses per token are left out": "토크나이저가 서로 달라 토큰당 손실은 비교하지 않았습니다",
    "too few pairs have a verdict to compare the systems": "판정이 있는 쌍이 너무 적어 비교할 수 없습니다",
    "no length-controlled win rate: the lengths differ by the same amount in all rows":
        "모든 행에서 길이 차이가 같아 길이 보정 승률을 구할 수 없습니다",
    "no trained model is better than the initial one": "학습한 모델 가운데 처음보다 나은 것이 없습니다",
}  # fmt: skip
"""Names and sentences without places. Names of figures are as ``figure_format.label`` writes them."""

BEGINNINGS = {
    "Eval ": "평가 {figure}",
    "eval ": "평가 {figure}",
    "answer ": "답변 {figure}",
    "reward/": "보상: {figure}",
    "reward by ": "{name}의 보상",
}
"""Beginning of a name -> the whole name; ``figure`` is the rest in Korean, ``name`` the rest as it is."""

SENTENCES = {
    # runs.assessment
    "{n_rows} held-out rows with {n_prompts} different prompts are too few to say whether the model is better: {n_least} "
    "different ones are needed":
        "평가용 행이 {n_rows}개지만 서로 다른 프롬프트는 {n_prompts}개뿐이라 모델이 나아졌는지 판단할 수 없습니다. 서로 다른 프롬프트가 {n_least}개는 있어야 합니다",
    "{n_rows} held-out rows are too few to say whether the model is better: {n_least} different ones are needed":
        "평가용 행이 {n_rows}개뿐이라 모델이 나아졌는지 판단할 수 없습니다. 서로 다른 행이 {n_least}개는 있어야 합니다",
    "no difference from before training can be told from chance: {figure}":
        "학습 전과 비교해 우연이라고 볼 수 없는 차이는 없습니다: {figure}",
    "better than before training: {figure}": "학습 전보다 좋아졌습니다: {figure}",
    "worse than before training: {figure}": "학습 전보다 나빠졌습니다: {figure}",
    "{figure} {n_was} -> {n_now}, a change of {n_change} ({n_low} to {n_high}) over {n_rows} held-out rows":
        "{figure} {n_was} → {n_now}, 변화 {n_change} (95% 구간 {n_low} ~ {n_high}), 평가용 행 {n_rows}개",
    "worse than the baseline ({baseline}: {n_value}): {figure} is {n_now}, {n_change} ({n_low} to {n_high}) away from it":
        "기준선({baseline}: {n_value})보다 나쁩니다: {figure} {n_now}, 차이 {n_change} (95% 구간 {n_low} ~ {n_high})",
    "not clearly better than the baseline ({baseline}: {n_value}): {figure} is {n_now}, {n_change} ({n_low} to {n_high}) "
    "away from it":
        "기준선({baseline}: {n_value})보다 확실히 낫다고 할 수 없습니다: {figure} {n_now}, 차이 {n_change} (95% 구간 {n_low} ~ {n_high})",
    "it predicts one class only, {name}, for all {n_rows} rows": "{n_rows}개 행 모두에 한 클래스({name})만 예측합니다",
    "it predicts {same} for all {n_rows} rows": "{n_rows}개 행 모두에 {same}을 예측합니다",
    "it predicts one tag only: {tag}": "한 가지 태그({tag})만 예측합니다",
    "it answers none of the {n_count} questions": "질문 {n_count}개에 하나도 답하지 않습니다",
    "always the mean, {n_mean}": "항상 평균 {n_mean}",
    "always {name}, the most frequent": "항상 가장 흔한 {name}",
    # runs.overfit
    "validation turned at step {n_step} while training kept falling: eval loss {n_best} -> {n_last}, train loss {n_before} "
    "-> {n_after}; {kept}":
        "{n_step}스텝부터 학습 손실은 계속 내려가는데 평가 손실은 올라갔습니다: 평가 손실 {n_best} → {n_last}, 학습 손실 {n_before} → {n_after}. {kept}",
    "the model of step {n_step} is kept": "{n_step}스텝의 모델을 남겼습니다",
    # evaluate.compare_models
    "{first} and {second} have no row in common": "{first}, {second}에 공통된 행이 없습니다",
    "the labels of the models differ, so {names} is not compared": "모델마다 라벨이 달라 다음은 비교하지 않았습니다: {names}",
    "no difference between {first} and {second} was seen: {change}":
        "{first}, {second} 사이에 구별되는 차이가 없습니다: {change}",
    "{change}; about {n_rows} rows would show a difference of {n_size}":
        "{change}. 행이 약 {n_rows}개면 {n_size}만큼의 차이도 구별할 수 있습니다",
    # judge.judge_run
    "no winner is named, because the judge failed its examination; {counts}":
        "심판이 시험을 통과하지 못해 승자를 정하지 않습니다. {counts}",
    "no difference was seen between {first} and {second}: {counts}":
        "{first}, {second} 사이에 구별되는 차이가 없습니다: {counts}",
    "{winner} is better than {loser}: {counts}": "{winner} 쪽이 {loser}보다 낫습니다: {counts}",
    "{counts}; about {n_pairs} pairs would show a win rate of 60%":
        "{counts}. 쌍이 약 {n_pairs}개면 60%의 승률도 구별할 수 있습니다",
    "{counts}, a difference of {n_value} ({n_low} to {n_high})": "{counts}, 차이 {n_value} ({n_low} ~ {n_high})",
    "{counts}; mean score {n_first} -> {n_second} of 5": "{counts}. 평균 점수 {n_first} → {n_second} (5점 만점)",
    "{counts}, {n_rate} ({n_low} to {n_high}) between answers of equal length":
        "{counts}, 길이가 같은 답변끼리는 {n_rate} ({n_low} ~ {n_high})",
    "{name} won {n_rate} ({n_low} to {n_high}) of {n_pairs} pairs (a tie counts half)":
        "{name}의 승률 {n_rate} ({n_low} ~ {n_high}), 쌍 {n_pairs}개, 무승부는 반승",
    # of compare again: the figure
    "{change} with {n_prompts} prompts": "{change} (서로 다른 프롬프트 {n_prompts}개)",
    "{figure} {n_before} -> {n_after}, a difference of {n_value} ({interval}), p = {n_p}, over {n_rows} rows":
        "{figure} {n_before} → {n_after}, 차이 {n_value} ({interval}), p = {n_p}, 행 {n_rows}개",
    # judge.examination, metrics.win_rate
    "kappa with {n_pairs} known answers": "정답이 있는 문항 {n_pairs}개와의 카파",
    "{n_value} ({n_low} to {n_high})": "{n_value} ({n_low} ~ {n_high})",
    "at least {n_value}": "{n_value} 이상",
    "at most {n_value}": "{n_value} 이하",
    "kappa with known answers is {n_kappa}; at least {n_least} is needed":
        "정답이 있는 문항과의 카파가 {n_kappa}입니다. {n_least} 이상이어야 합니다",
    "it prefers the first answer in {n_share} of its verdicts": "판정의 {n_share}에서 먼저 읽은 답변을 골랐습니다",
    "it prefers the second answer in {n_share} of its verdicts": "판정의 {n_share}에서 나중에 읽은 답변을 골랐습니다",
    "it prefers the longer answer: the longer one won {n_won} of decided pairs and was better in {n_better}":
        "더 긴 답변을 선호합니다: 승부가 난 쌍의 {n_won}에서 긴 쪽을 골랐지만 실제로 나은 것은 {n_better}입니다",
    "it prefers the shorter answer: the longer one won {n_won} of decided pairs and was better in {n_better}":
        "더 짧은 답변을 선호합니다: 승부가 난 쌍의 {n_won}에서만 긴 쪽을 골랐지만 실제로 나은 것은 {n_better}입니다",
    "asked again, it repeats {n_share} of its verdicts": "다시 물으면 판정의 {n_share}만 똑같이 되풀이합니다",
    "it gave no verdict on {n_share} of the pairs": "쌍의 {n_share}에서 판정을 내리지 못했습니다",
    "no length-controlled win rate: {n_count} verdicts, at least {n_least} are needed":
        "판정이 {n_count}개뿐이라 길이 보정 승률을 구할 수 없습니다. {n_least}개 이상이 필요합니다",
    "{sentence}; length alone explains every verdict, so the length-controlled win rate depends on the prior":
        "{sentence}. 길이만으로 모든 판정이 설명되므로 길이 보정 승률은 사전 분포에 좌우됩니다",
    "an answer longer by one standard deviation ({n_words} words) has {n_odds} times the odds to win":
        "표준편차 하나({n_words}단어)만큼 긴 답변은 이길 오즈가 {n_odds}배입니다",
    # rollout.rollout_warnings
    "step {n_step}: warning: {warning}": "{n_step}스텝 경고: {warning}",
    "no answer of this iteration ended by itself: all were cut at objective.max_new_tokens, and rewards score the cut texts. "
    "Raise objective.max_new_tokens, or reward answers that end, with {type: final_stop} under objective.rewards":
        "이번 반복에서 스스로 끝난 답변이 없습니다. 모두 objective.max_new_tokens에서 잘렸고, 보상은 잘린 글을 채점합니다. "
        "objective.max_new_tokens를 늘리거나 objective.rewards에 {{type: final_stop}}을 넣어 끝맺는 답변에 보상을 주세요",
    "the policy's entropy fell from {n_first} to {n_now} nats a token: its answers to a prompt are nearly all alike, so sampling "
    "finds nothing better. Raise {key}, or lower train.learning_rate":
        "정책의 엔트로피가 토큰당 {n_first}에서 {n_now}낫으로 떨어졌습니다. 한 프롬프트의 답변이 거의 같아 샘플링으로 더 나은 답을 찾지 못합니다. "
        "{key} 값을 올리거나 train.learning_rate를 낮추세요",
    "answers grew from {n_first} to {n_now} tokens: the reward may pay for length. Read samples.jsonl; a reward {type: length, "
    "target: N} under objective.rewards keeps the length":
        "답변이 {n_first}토큰에서 {n_now}토큰으로 길어졌습니다. 보상이 길이에 끌려가는지 samples.jsonl을 읽어 보세요. objective.rewards에 "
        "{{type: length, target: N}}을 넣으면 길이가 유지됩니다",
    "answers shrank from {n_first} to {n_now} tokens: the reward may pay for length. Read samples.jsonl; a reward {type: length, "
    "target: N} under objective.rewards keeps the length":
        "답변이 {n_first}토큰에서 {n_now}토큰으로 짧아졌습니다. 보상이 길이에 끌려가는지 samples.jsonl을 읽어 보세요. objective.rewards에 "
        "{{type: length, target: N}}을 넣으면 길이가 유지됩니다",
    "over {n_count} iterations the KL divergence of an answer rose from {n_kl} to {n_kl_now} nats, and the reward did not rise "
    "({n_reward} to {n_reward_now}). Raise {key}, or lower train.learning_rate":
        "{n_count}번 반복하는 동안 답변당 KL 발산이 {n_kl}에서 {n_kl_now}낫으로 커졌지만 보상은 오르지 않았습니다({n_reward} → {n_reward_now}). "
        "{key} 값을 올리거나 train.learning_rate를 낮추세요",
    "over {n_count} iterations the reward rose by {n_rise} and the answers' length changed by {n_longer} tokens. At equal length "
    "the reward fell by {n_fall}: the policy learns length, not quality. Add {type: length, target: N} to objective.rewards, or "
    "raise {key}":
        "{n_count}번 반복하는 동안 보상이 {n_rise} 오르고 답변 길이가 {n_longer}토큰 변했습니다. 길이가 같으면 보상은 {n_fall} 떨어졌습니다. 정책이 "
        "품질이 아니라 길이를 배우고 있습니다. objective.rewards에 {{type: length, target: N}}을 넣거나 {key} 값을 올리세요",
    "the reward of the training prompts rose from {n_train} to {n_train_now}, and that of the held-out prompts fell from {n_eval} "
    "to {n_eval_now}: the policy is overfit. Train fewer steps (train.max_steps), add prompts, or raise {key}":
        "학습 프롬프트의 보상은 {n_train}에서 {n_train_now}로 올랐지만 평가 프롬프트의 보상은 {n_eval}에서 {n_eval_now}로 떨어졌습니다. 정책이 과적합되었습니다. "
        "스텝을 줄이거나(train.max_steps) 프롬프트를 늘리거나 {key} 값을 올리세요",
    # notes of an evaluation and of a run
    "no improvement in {n_count} evaluations; the best was {n_best} at step {n_step}":
        "평가 {n_count}번 동안 나아지지 않았습니다. 가장 좋은 값은 {n_step}스텝의 {n_best}입니다",
    "questions: {n_count}, {n_none} of them without an answer: {effect}": "질문 {n_count}개, 그중 답이 없는 것 {n_none}개: {effect}",
    "margins: {n_scored} of {n_rows} rows have scores; for the others the margin is 0":
        "마진: 행 {n_rows}개 중 {n_scored}개에 점수가 있고, 나머지는 마진이 0입니다",
    "warning: {line}, later than asked for": "경고: {line}. 요청한 시간보다 늦습니다",
    "{head}, because a step takes {n_step} s, an evaluation {n_evaluation} s; the run will end after about {time}":
        "{head}. 한 스텝에 {n_step}초, 평가 한 번에 {n_evaluation}초가 걸려 약 {time} 뒤에 끝납니다",
    "train.max_minutes {n_minutes}: {n_steps} of {n_most} steps": "train.max_minutes {n_minutes}: {n_most}스텝 중 {n_steps}스텝",
    "train.max_minutes {n_minutes}: all {n_most} steps fit": "train.max_minutes {n_minutes}: {n_most}스텝을 모두 마칠 수 있습니다",
    "weights: {total} in memory: {parts}": "메모리에 있는 가중치 {total}: {parts}",
    "the network {network}, fp32 masters of what is trained {masters}, the reference, a copy of what is trained, {copy}":
        "네트워크 {network}, 학습 대상의 fp32 마스터 {masters}, 참조 정책(학습 대상의 사본) {copy}",
    "the network {network}, the reference, a copy of what is trained, {copy}":
        "네트워크 {network}, 참조 정책(학습 대상의 사본) {copy}",
    "the network {network}, fp32 masters of what is trained {masters}": "네트워크 {network}, 학습 대상의 fp32 마스터 {masters}",
    "{size} ({n_count} parameters)": "{size}(파라미터 {n_count}개)",
    "tags: {n_count} ({kind}); the most frequent is '{name}' ({n_share} of the words)":
        "태그 {n_count}개({kind}), 가장 흔한 것은 ‘{name}’(단어의 {n_share})",
    "{scheme}, {n_count} types of entities": "{scheme}, 개체 종류 {n_count}개",
    "plain transformers cannot open the adapter in model/ ({why}): a copy with the adapter merged is in {folder}/":
        "transformers만으로는 model/의 어댑터를 열 수 없습니다({why}). 어댑터를 병합한 사본이 {folder}/에 있습니다",
    "{n_rows} bad rows were left out": "잘못된 행 {n_rows}개를 뺐습니다",
    "the reference is the policy before its first step: {n_rows} rows, {n_tokens} tokens, computed once":
        "참조 정책은 첫 스텝 이전의 정책입니다: 행 {n_rows}개, 토큰 {n_tokens}개를 한 번만 계산했습니다",
    "resumed after step {n_step}": "{n_step}스텝 뒤에서 이어서 학습했습니다",
    "labels: {n_count} classes; the most frequent is '{name}' ({n_share} of the rows)":
        "라벨: 클래스 {n_count}개, 가장 흔한 것은 ‘{name}’(행의 {n_share})",
    "{n_low} to {n_high}": "{n_low} ~ {n_high}",
    "always {name}": "항상 {name}",
}  # fmt: skip
"""English sentence -> Korean sentence with the same places. Longer ones before those that would fit their beginning."""
