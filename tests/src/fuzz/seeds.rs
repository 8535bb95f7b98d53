//! What a fuzzer begins with: the metadata of a real pool, real requests, and words as people type them.

use super::image::metadata;
use crate::nbd;

/// Bytes before a page's own fields, and before a journal block's records.
const HEADER_BYTES: usize = 64;
/// Where the length stands in a journal block.
const LENGTH_AT: usize = 44;

/// Inputs for the target of this name.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "superblock" => starting(b"BLKFORK\0", |block| prefixed(1, block)),
        "page-header" => starting(b"BFpg", |block| {
            prefixed(block[40].wrapping_sub(1) | block[41] << 5, block)
        }),
        "map-page" => pages(1, true),
        "counts-page" => pages(2, false),
        "counts-index" => pages(4, true),
        "catalog-page" => pages(5, false),
        "catalog-index" => vec![vec![0; 17], [&[0][..], &[9; 16]].concat()],
        "journal-block" => starting(b"BFjb", |block| {
            prefixed(1, &block[LENGTH_AT..HEADER_BYTES + records_bytes(block)])
        }),
        "record" => records(),
        "ring" => rings(),
        "request" => lines(REQUESTS),
        "message" => lines(MESSAGES),
        "state-file" => lines(STATE_FILES),
        "word" => lines(WORDS),
        "name" => lines(NAMES),
        "nbd-handshake" => handshakes(),
        "nbd-request" => requests(),
        "signature" => signatures(),
        "pool" => edits(),
        "operations" => operations(),
        _ => Vec::new(),
    }
}

fn prefixed(first: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    bytes.extend_from_slice(rest);
    // The targets put zeros behind an input.
    while bytes.len() > 1 && bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

fn starting(magic: &[u8], seed: impl Fn(&[u8]) -> Vec<u8>) -> Vec<Vec<u8>> {
    let blocks = metadata().into_iter();
    let chosen = blocks.filter(|(_, block)| block.starts_with(magic));
    chosen.map(|(_, block)| seed(block)).collect()
}

fn pages(kind: u8, with_level: bool) -> Vec<Vec<u8>> {
    let blocks = metadata().into_iter().map(|(_, block)| block);
    let chosen = blocks.filter(|block| block.starts_with(b"BFpg") && block[40] == kind);
    chosen
        .map(|block| {
            let level = block[41].saturating_sub(u8::from(kind == 4));
            let seed = prefixed(level, &block[HEADER_BYTES..]);
            if with_level { seed } else { seed[1..].to_vec() }
        })
        .collect()
}

fn records_bytes(block: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([block[LENGTH_AT], block[LENGTH_AT + 1]]))
}

/// The records of the journal, each with its frame of three bytes.
fn framed() -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for (_, block) in metadata() {
        if !block.starts_with(b"BFjb") {
            continue;
        }
        let mut rest = &block[HEADER_BYTES..HEADER_BYTES + records_bytes(block)];
        while rest.len() > 3 {
            let length = usize::from(u16::from_le_bytes([rest[0], rest[1]]));
            let (one, after) = rest.split_at(3 + length);
            found.push(one.to_vec());
            rest = after;
        }
    }
    found
}

fn records() -> Vec<Vec<u8>> {
    let framed = framed().into_iter();
    framed.map(|record| record[3..].to_vec()).collect()
}

/// Rings that begin at their start and near their end. The first checksum byte is odd, so that it is made right.
fn rings() -> Vec<Vec<u8>> {
    let mut data = Vec::new();
    for (record, seq) in framed().iter().zip(7_u64..) {
        data.extend([1, 0, 0, 0]);
        data.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
        data.extend(seq.to_le_bytes());
        data.extend(record);
    }
    let length = data.len() as u64 + 40;
    data.extend([0; 40]);
    let at = |start: u64| [&start.to_le_bytes()[..], &data].concat();
    vec![at(0), at(length - 40), at(length * 1000)]
}

/// An edit of each metadata block: a field of its own, by one and to the utmost.
fn edits() -> Vec<Vec<u8>> {
    let mut seeds = vec![Vec::new()];
    for (index, _) in metadata().iter().enumerate() {
        let index = u8::try_from(index).unwrap();
        seeds.push(vec![index, 66, 0, 1, 1]);
        seeds.push([&[index, 72, 0, 8][..], &[0xff; 8]].concat());
    }
    seeds
}

/// A client that asks everything and then begins, the old way in, and one that leaves.
fn handshakes() -> Vec<Vec<u8>> {
    const FLAGS: [u8; 5] = [0, 0, 0, 0, 3];
    let contexts = [&[0, 0, 0, 4][..], b"p0/v", &[0, 0, 0, 1, 0, 0, 0, 15]].concat();
    let contexts = [&contexts[..], b"base:allocation"].concat();
    let info = [&[0, 0, 0, 4][..], b"p0/v", &[0, 2, 0, 1, 0, 3]].concat();
    let asked = [
        (8, &[][..]),
        (3, &[]),
        (9, &contexts),
        (10, &contexts),
        (6, &info),
        (7, &info),
    ];
    let said = |options: &[(u32, &[u8])]| {
        let options = options.iter().map(|(kind, data)| nbd::option(*kind, data));
        [FLAGS.to_vec(), options.flatten().collect()].concat()
    };
    vec![
        said(&asked),
        said(&[(1, b"p0/v")]),
        said(&[(5, &[]), (2, &[])]),
    ]
}

/// Every request, first to a volume, then to a snapshot with structured replies.
fn requests() -> Vec<Vec<u8>> {
    let requests = [0, 1, 3, 4, 6, 7, 5, 2].map(|command| {
        let ask = nbd::Ask {
            cookie: 7,
            command,
            flags: nbd::FUA,
            offset: 4096,
            bytes: 4096 * u32::from(command != 1),
        };
        ask.encode()
    });
    let all = requests.concat();
    vec![[&[0][..], &all].concat(), [&[13][..], &all].concat()]
}

/// A file system, a table at the end, and a pool that ends within its first block.
fn signatures() -> Vec<Vec<u8>> {
    let file = |bytes: u64, place: u32, content: &[u8]| {
        let length = u8::try_from(content.len()).unwrap();
        let place = &place.to_le_bytes()[..3];
        [&bytes.to_le_bytes()[..], &[length], place, content].concat()
    };
    vec![
        file(1 << 24, 1080, &[0x53, 0xef]),
        file(1 << 40, (1 << 23) + 512, b"EFI PART"),
        file(100, 0, b"BLKFORK\0"),
    ]
}

fn operations() -> Vec<Vec<u8>> {
    let all = [
        [4, 0, 0, 0], // create v0
        [0, 0, 1, 7], // write
        [5, 0, 0, 0], // snapshot
        [0, 0, 2, 9],
        [7, 0, 1, 0], // clone
        [0, 1, 9, 3],
        [3, 0, 0, 200], // discard
        [11, 0, 1, 0],  // reopen
        [8, 0, 0, 0],   // roll back
        [9, 0, 0, 0],   // remove
        [13, 0, 0, 0],  // maintain
        [10, 0, 0, 0],
    ];
    vec![all.concat(), all[..3].concat(), all[..8].concat()]
}

fn lines(lines: &[&str]) -> Vec<Vec<u8>> {
    lines.iter().map(|line| line.as_bytes().to_vec()).collect()
}

const REQUESTS: &[&str] = &[
    "\"status\"\n\"stats\"\n\"list\"\n\"devices\"\n\"check\"\n\"stop\"\n",
    "{\"diff\":{\"from\":{\"volume\":\"v\",\"snapshot\":\"s\"},\"to\":{\"volume\":\"v\",\"snapshot\":null}}}\n",
    "{\"create\":{\"volume\":\"v\",\"options\":{\"bytes\":1048576,\"sector_bytes\":4096,\"redirect\":\"shared\"}}}\n",
    "{\"remove\":{\"targets\":[{\"volume\":\"v\",\"snapshot\":null}],\"recursive\":true,\"dry_run\":false}}\n",
    "{\"resize\":{\"volume\":\"v\",\"bytes\":1048576,\"allow_shrink\":false}}\n",
    "{\"snapshot\":{\"targets\":[{\"volume\":\"v\",\"snapshot\":\"s\"}]}}\n",
    "{\"clone\":{\"snapshot\":{\"volume\":\"v\",\"snapshot\":\"s\"},\"volume\":\"w\"}}\n",
    "{\"rollback\":{\"snapshot\":{\"volume\":\"v\",\"snapshot\":\"s\"}}}\n{\"grow\":{\"bytes\":134217728}}\n",
    "{\"attach\":{\"path\":{\"volume\":\"v\",\"snapshot\":null},\"read_only\":false,\"queues\":2,\"depth\":64}}\n",
    "{\"detach\":{\"devices\":\"all\",\"force\":false}}\n",
];

const MESSAGES: &[&str] = &[
    "{\"hello\":{\"version\":1,\"pool\":\"p0\",\"pid\":77}}",
    "{\"progress\":{\"done\":1,\"total\":2}}",
    "{\"reply\":\"done\"}",
    "{\"reply\":{\"diff\":[{\"offset\":0,\"length\":4096,\"kind\":\"data\"}]}}",
    "{\"error\":{\"kind\":\"busy\",\"message\":\"p0/v: is attached\"}}",
    "\"stopping\"",
];

const STATE_FILES: &[&str] = &[
    "{\"name\":\"p0\",\"path\":\"/srv/p0.pool\",\"id\":\"00000000-0000-0000-0000-000000000000\"}",
    "{\"pool\":\"x\",\"boot\":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15],\"devices\":[{\"path\":{\"volume\":\"v\",\"snapshot\":null},\"id\":1,\"read_only\":false,\"state\":{\"dev_id\":0,\"queues\":1,\"depth\":128,\"io_buffer_bytes\":524288,\"flags\":0,\"mark\":1}}]}",
];

const NAMES: &[&str] = &["p0", "p0/v", "p0/v@s-1.2:3", "a..b", "v@s@t"];

const WORDS: &[&str] = &[
    "p0",
    "p0/v",
    "p0/v@s-1.2:3",
    "10G",
    "1.5GiB",
    "0.5K",
    "15E",
    "99999999999999999999",
    "../x",
];
