"""The passages of the handbook."""

PASSAGES = [
    "You get 30 days of paid vacation per year. Ask your team lead before you book a trip.",
    "The office is closed on Sundays. On Saturdays, the door opens with your badge from 9 to 14 o'clock.",
    "Travel by train is booked in second class. For trips of more than six hours, first class is paid.",
    "If you are ill, call the office before 10 o'clock. From the third day, send a doctor's note.",
    "A lost laptop must be reported to security within one hour, also at night.",
    "Meals on business trips are paid up to 40 euros per day. Keep the receipts.",
]
