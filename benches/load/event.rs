//! The event that every bench publishes: JSON of exactly 1 KiB with a number that finds it again at the receiver.

/// Bytes of a request body.
const SIZE: usize = 1_024;
/// Digits of an event's number.
const DIGITS: usize = 12;
/// Stands in front of the number, in what is published and, however the JSON was written again, in what is delivered.
const MARK: &[u8] = b"\"bench_number\"";

/// Request heads and body, ready but for the number.
pub struct Template {
    plain: Parts,
    keyed: Parts,
}

struct Parts {
    bytes: Vec<u8>,
    /// Where the number stands: in the body, and in the key if there is one.
    numbers: Vec<usize>,
}

impl Template {
    pub fn new(authority: &str, path: &str, token: Option<&str>, run: &str) -> Self {
        let body = body();
        let head = |key: &str| {
            let authorization = token.map(|t| format!("authorization: Bearer {t}\r\n")).unwrap_or_default();
            format!(
                "POST {path} HTTP/1.1\r\nhost: {authority}\r\ncontent-type: application/json\r\n\
                 content-length: {SIZE}\r\n{authorization}{key}\r\n"
            )
        };
        let parts = |head: String| {
            let text = head + &body;
            let numbers = text.match_indices(&"0".repeat(DIGITS)).map(|(at, _)| at).collect();
            Parts { bytes: text.into_bytes(), numbers }
        };
        Self {
            plain: parts(head("")),
            keyed: parts(head(&format!("idempotency-key: {run}-{}\r\n", "0".repeat(DIGITS)))),
        }
    }

    /// Writes request `number` over `request`.
    pub fn write(&self, number: u64, request: &mut Vec<u8>) {
        let parts = if number % 2 == 1 { &self.keyed } else { &self.plain };
        request.clear();
        request.extend_from_slice(&parts.bytes);
        for &at in &parts.numbers {
            let mut rest = number;
            for place in request[at..at + DIGITS].iter_mut().rev() {
                *place = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        }
    }
}

/// An order as somebody might send it, filled up with a note.
fn body() -> String {
    let event = |note: &str| {
        format!(
            concat!(
                r#"{{"workflow":"bench","tenant_id":"t1","payload":{{"bench_number":"{}","#,
                r#""order":{{"id":48213,"currency":"EUR","total":1234.5,"paid":true,"coupon":null,"items":["#,
                r#"{{"sku":"KB-2207","quantity":2,"price":79.9}},{{"sku":"MS-118","quantity":1,"price":24.5}},"#,
                r#"{{"sku":"MN-27Q","quantity":3,"price":350.1}}]}},"#,
                r#""customer":{{"id":"c-99817","name":"Zoë Österreicher","email":"zoe@example.org","#,
                r#""address":{{"street":"Hauptstraße 12","zip":"8010","city":"Graz","country":"AT"}}}},"#,
                r#""tags":["b2b","priority","newsletter"],"note":"{}"}}}}"#
            ),
            "0".repeat(DIGITS),
            note
        )
    };
    let room = SIZE - event("").len();
    event(&"please ring twice ".chars().cycle().take(room).collect::<String>())
}

/// The number of a delivered event.
pub fn number(body: &[u8]) -> Option<u64> {
    let at = body.windows(MARK.len()).position(|w| w == MARK)? + MARK.len();
    let digits = body[at..].iter().skip_while(|b| !b.is_ascii_digit()).take(DIGITS);
    digits
        .copied()
        .try_fold((0, 0), |(n, count), b| b.is_ascii_digit().then(|| (n * 10 + u64::from(b - b'0'), count + 1)))
        .and_then(|(n, count)| (count == DIGITS).then_some(n))
}
