"""Korean texts of the pages, by page: the English text that a page gives to ``language.t`` -> its Korean.

A text in braces, such as ``{count}``, is a place that the page fills. Texts of several sentences have a short
name, and ``ENGLISH`` has their English.
"""

EVERY_PAGE = {
    "Written by tunesmith {version}": "tunesmith {version}에서 만든 보고서",
    "notes": "알림",
    "none": "없음",
    "yes": "예",
    "no": "아니요",
    "(none)": "(없음)",
    "(empty)": "(비어 있음)",
    "prompt": "프롬프트",
    "better": "나아짐",
    "worse": "나빠짐",
    "no difference seen": "구별되는 차이 없음",
    "{done} of {all}": "{all}개 중 {done}개",
    " or ": ", ",
    "passed": "통과",
    "failed": "탈락",
}

RUN = {
    "tunesmith run": "tunesmith 실행",
    "Evaluation sets": "평가 세트",
    "Curves": "곡선",
    "Answers before and after": "학습 전후의 답변",
    "{count} in between": "중간 답변 {count}개",
    "Answers to held-out prompts": "평가용 프롬프트에 대한 답변",
    "About the figures of answers": (
        "변화는 같은 프롬프트에서 학습 전과 가장 좋은 스텝을 비교한 값입니다. 같은 평가를 100번 하면 그중 95번은 실제 변화가 구간 안에 듭니다."
    ),
    "Worst answers to held-out prompts": "평가용 프롬프트에 대한 가장 나쁜 답변",
    "Worst mistakes on held-out rows": "평가용 행에서 가장 크게 틀린 답",
    "Some right answers": "맞힌 답 몇 가지",
    "Data": "데이터",
    "Recipe, every default filled in": "레시피(모든 기본값 포함)",
    "Machine": "장비",
    "Manifest": "매니페스트",
    "Steps": "스텝",
    "{epochs} epochs": "{epochs}에폭",
    "Speed": "속도",
    "{rate} tokens/s": "{rate}토큰/초",
    "padding not counted": "패딩 제외",
    "Peak memory": "최대 메모리",
    "of {memory}": "전체 {memory}",
    "Trained": "학습한 파라미터",
    "{count} parameters": "{count}개",
    "{share} of {total}": "전체 {total}의 {share}",
    "before training": "학습 전",
    "on held-out rows": "평가용 행 기준",
    "baseline {value}: {words}": "기준선 {value}: {words}",
    ", may be chance": ", 우연일 수 있음",
    "{figure} before": "{figure} 이전",
    "{figure} after": "{figure} 이후",
    "Overfit: {verdict}.": "과적합: {verdict}.",
    "The notes below are as they were recorded.": "아래 알림은 기록된 그대로(영어)입니다.",
    "Stopped early: {reason}": "조기 종료: {reason}",
    "This run stopped. {reason}": "실행이 중단되었습니다. {reason}",
    "This run had not finished when the report was written.": "보고서를 쓸 때 실행이 아직 끝나지 않았습니다.",
    " Its last record is of step {step}.": " 마지막 기록은 {step}스텝입니다.",
    "{name} cannot be read: {error}": "{name} 파일을 읽을 수 없습니다: {error}",
    "train": "학습",
    "eval": "평가",
    "eval {name}": "평가 {name}",
    "Loss": "손실",
    "Held-out figures": "평가 지표",
    "Learning rate": "학습률",
    "Learning rate of the output layer": "출력층 학습률",
    "Loss scale": "손실 스케일",
    "Gradient norm": "그래디언트 노름",
    "Update / weights, often about 1e-3": "업데이트 / 가중치(보통 1e-3 안팎)",
    "Tokens per second": "초당 토큰",
    "Seconds by phase": "단계별 시간",
    "Tokens per second by phase": "단계별 초당 토큰",
    "sampling": "샘플링",
    "scoring": "채점",
    "log-probabilities": "로그확률 계산",
    "update": "업데이트",
    "before": "학습 전",
    "after": "학습 후",
    "first": "첫 답변",
    "between": "중간",
    "reference, from the data": "데이터의 정답",
    "answer, row {row}": "답변, {row}행",
    "step {step}": "{step}스텝",
    "cut at {count} tokens": "{count}토큰에서 자름",
    "{name} from {first} to {last}": "{name} {first}에서 {last}(으)로",
    "{title} by step: {curves}": "스텝별 {title}: {curves}",
    "not finite at step {steps}": "유한하지 않은 스텝: {steps}",
    " and {count} more": " 외 {count}개",
}

DATA = {
    "Examples": "예제",
    "Tokens per training example": "학습 예제당 토큰",
    "Sources": "데이터 파일",
    "Rows left out": "뺀 행",
    "Text the template leaves out": "템플릿이 빠뜨린 글",
    "Rows without supervised tokens": "학습 대상 토큰이 없는 행",
    "Text in both evaluation and training, {letters} letters or more": "평가와 학습에 모두 있는 글({letters}자 이상)",
    "The chat template leaves out text, so the model did not learn it: {text}. Choose another data.template, or change these "
    "rows.": "대화 템플릿이 글 일부를 빠뜨려서 모델이 배우지 못했습니다: {text}. data.template을 바꾸거나 이 행들을 고치세요.",
    "{rows} held-out rows are also training rows, so the held-out figures are better than those on new text. Remove them from "
    "one side.": "평가용 행 {rows}개가 학습 데이터에도 있어 평가 지표가 실제보다 좋게 나옵니다. 한쪽에서 빼세요.",
    "{rows} held-out rows{part} share long passages with training rows, so the held-out figures are better than those on new "
    "text. The data section below shows some.": (
        "평가용 행 {rows}개{part}가 학습 행과 긴 글을 공유해 평가 지표가 실제보다 좋게 나옵니다. 아래 데이터 항목에 예가 있습니다."
    ),
    ", for example {row}": ", 예: {row}",
    "{path}: {rows} of {all} rows looked at": "{path}: 살펴본 {all}행 중 {rows}행",
}

TASK = {
    "tunesmith evaluation": "tunesmith 평가",
    "Figures, intervals, baselines": "지표, 구간, 기준선",
    "Other figures": "그 밖의 지표",
    "Figures": "지표",
    "By class": "클래스별",
    "By type": "종류별",
    "{count}, the most frequent first": "{count}개, 많은 것부터",
    "Pictures": "그림",
    "Worst mistakes": "가장 크게 틀린 답",
    "What was measured": "측정 조건",
    "Confusion matrix: counts, coloured by the share of the row": "혼동 행렬: 개수(색은 행 안의 비율)",
    "The figures are in the table above.": "값은 위의 표에 있습니다.",
    "Precision, recall and F1": "정밀도, 재현율, F1",
    "Precision and recall at every threshold": "임계값별 정밀도와 재현율",
    "Calibration: how confident the model is, and how often it is right": "보정: 모델의 확신도와 실제로 맞힌 비율",
    "{share} are right at a confidence of {confidence}": "확신도 {confidence}에서 맞힌 비율 {share}",
    "Accuracy by how much longer the better answer is: does the model only measure length?": (
        "나은 답변이 얼마나 더 긴지에 따른 정확도: 길이만 보고 있지는 않은가?"
    ),
    "{true} is predicted as {predicted} {count} times": "{true}의 예측이 {predicted}인 경우 {count}번",
    "No confusions": "혼동 없음",
    "{value} by always predicting the same": "항상 같은 답이면 {value}",
    "{value} by always taking the longer one": "항상 긴 쪽을 고르면 {value}",
    "{value} by always taking the shorter one": "항상 짧은 쪽을 고르면 {value}",
    "and {count} more rows with the same mistake": "같은 실수가 {count}행 더 있음",
    "true": "정답",
    "predicted": "예측",
    "better answer": "나은 답변",
    "better, preferred by the model": "나은 답변(모델도 선호)",
    "preferred by the model": "모델이 선호한 답변",
    "other": "다른 답변",
    "({count} more characters)": "({count}자 더 있음)",
}

CHARTS = {
    "step": "스텝",
    "tokens": "토큰",
    "loss": "손실",
    "training loss": "학습 손실",
    "held-out loss": "평가 손실",
    "no records": "기록 없음",
    "no held-out rows": "평가용 행 없음",
    "{count} others": "그 밖 {count}개",
    "precision": "정밀도",
    "recall": "재현율",
    "accuracy": "정확도",
    "share (in brackets: rows of the class)": "비율(괄호 안은 클래스의 행 수)",
    "the {count} most frequent of {all} classes": "클래스 {all}개 중 많은 순서로 {count}개",
    "accuracy (in brackets: pairs; dashed: chance)": "정확도(괄호 안은 쌍의 수, 점선은 우연)",
    " ({count} of {all} labels)": " (라벨 {all}개 중 {count}개)",
    "perfect calibration": "완전한 보정",
    "measured": "측정값",
    "confidence": "확신도",
    "share of all": "전체 중 비율",
    "← worse    difference in half-widths of its interval    better →": "← 나빠짐    차이(구간 반폭 단위)    나아짐 →",
    "#n = class n, counted from 0: no installed font has its letters": "#n = 0부터 센 클래스 번호: 이 글자가 있는 글꼴이 없습니다",
}

COMPARE = {
    "Models": "모델",
    "About the figures of a comparison": (
        "구간: 이런 비교를 100번 하면 95번은 실제 차이가 그 안에 듭니다. p: 두 모델이 똑같이 좋을 때 이만한 차이가 나올 확률이며, 비교 횟수만큼 "
        "보정했습니다. 구별 가능한 차이: 실제 차이가 이 값 이상이면 다섯 번 중 네 번은 찾아냅니다."
    ),
    "Rows that got worse most": "가장 나빠진 행",
    "Rows that got better most": "가장 나아진 행",
    "{rows} rows of {data} with {prompts} different prompts": "{data} {rows}행, 서로 다른 프롬프트 {prompts}개",
    "{second} minus {first}, in half-widths of the 95% interval": "{second} − {first}, 95% 구간의 반폭 단위",
    "A bar that does not touch zero is a difference that chance alone seldom makes": "0에 닿지 않는 막대는 우연만으로는 드문 차이입니다",
    "row {row}: {change}": "{row}행: {change}",
}

JUDGE = {
    "judge: {name}": "심판: {name}",
    "Win rates, a tie counts half": "승률(무승부는 반승)",
    "{second} against {first}": "{second} 대 {first}",
    "Examination of the judge": "심판 시험",
    "About the examination of a judge": (
        "어느 답변이 나은지 정답이 있는 문항으로 시험합니다. 내장 문항의 절반은 짧은 쪽이 정답입니다. 우연이나 순서, 길이로 고르는 심판의 카파는 0, 늘 "
        "맞히는 심판의 카파는 1입니다."
    ),
    "{first} and {second}, the first rows": "{first}, {second}: 처음 몇 행",
    "row {row}: a tie": "{row}행: 무승부",
    "row {row}: {winner} is better": "{row}행: {winner} 승",
    "Cost": "비용",
    "the judge failed its examination: {failure}": "심판이 시험에서 탈락했습니다: {failure}",
    "of {pairs} pairs won": "쌍 {pairs}개 기준 승률",
    "kappa {value}": "카파 {value}",
}

PIPELINE = {
    "Stages": "단계",
    "stage": "단계",
    "objective": "목적 함수",
    "adaptation": "어댑테이션",
    "trained from": "출발 모델",
    "steps": "스텝",
    "time": "시간",
    "peak memory": "최대 메모리",
    "report": "보고서",
    "not trained": "학습 안 함",
    "{name}: held-out rows": "{name}: 평가용 행",
    "Answers to the same {count} prompts": "같은 프롬프트 {count}개에 대한 답변",
    "trained": "학습 완료",
    "Time": "시간",
    "in optimiser steps": "옵티마이저 스텝만",
    "reward by {judge} {score}": "{judge} 보상 {score}",
    "reference": "정답",
}

PAGES = {
    "every page": EVERY_PAGE,
    "run": RUN,
    "data": DATA,
    "task": TASK,
    "charts": CHARTS,
    "compare": COMPARE,
    "judge": JUDGE,
    "pipeline": PIPELINE,
}
TEXTS = {english: korean for texts in PAGES.values() for english, korean in texts.items()}

ENGLISH = {
    "About the figures of answers": (
        "Each change is over the same prompts before training and at the best step; its interval holds the true change in 95 of "
        "100 such evaluations."
    ),
    "About the figures of a comparison": (
        "The interval holds the difference in 95 of 100 such comparisons. p is the probability of a difference as large if the "
        'models are equally good, adjusted for the number of comparisons. A difference from "visible from" on is found four times '
        "in five."
    ),
    "About the examination of a judge": (
        "Pairs with a known better answer, which is the shorter one in half of the built-in pairs. Kappa is 0 for a judge that goes "
        "by chance, position or length, and 1 for one that is always right."
    ),
}
"""The texts of several sentences, by their short name."""
