//! The handshake: each option of the client, and what is answered. Fixed newstyle, one export, no TLS.
//!
//! Invariant: no I/O. An answer is at most some hundred bytes, whatever was sent.

use super::wire::{
    Fields, GREETING_MAGIC, Message, OPTION_MAGIC, OPTION_REPLY_MAGIC, allocation, greeting, info,
    option, option_reply, transmission,
};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{NBD_OPTION_BYTES_MAX, NBD_PAYLOAD_BYTES_MAX};
use crate::units::BLOCK_BYTES;

/// Bytes in the header of an option.
pub(super) const OPTION_HEADER_BYTES: usize = 16;

/// What a client is told of the export.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer<'a> {
    /// Its name; the empty name means it too.
    pub(super) name: &'a str,
    /// Its size.
    pub(super) bytes: u64,
    /// What offsets and lengths are multiples of.
    pub(super) sector_bytes: u32,
    /// Whether writes are refused.
    pub(super) is_read_only: bool,
}

/// What was agreed on for the transmission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Whether reads are answered in chunks.
    pub(super) structured: bool,
    /// Whether the client may ask what is allocated.
    pub(super) allocation: bool,
}

/// What comes after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another option.
    Option,
    /// The transmission.
    Transmission(Agreed),
    /// The end of the connection.
    End,
}

/// The state of a handshake.
#[derive(Debug)]
pub(super) struct Handshake<'a> {
    offer: Offer<'a>,
    wants_zeroes: bool,
    structured: bool,
    /// The export for which the client selected `base:allocation`.
    allocation_of: Option<Vec<u8>>,
}

/// The first bytes to a client.
pub(super) fn greeting() -> Vec<u8> {
    let flags = greeting::FIXED_NEWSTYLE | greeting::NO_ZEROES;
    let message = Message::default().u64(GREETING_MAGIC).u64(OPTION_MAGIC);
    message.u16(flags).0
}

/// Takes an option's header apart: its number, and how many bytes follow.
pub(super) fn option_header(header: [u8; OPTION_HEADER_BYTES]) -> Result<(u32, usize)> {
    let mut fields = Fields(&header);
    let (magic, number, bytes) = (fields.u64(), fields.u32(), fields.u32());
    let (Some(OPTION_MAGIC), Some(number), Some(bytes)) = (magic, number, bytes) else {
        return Err(Error::with(ErrorKind::Invalid, "not an option of NBD"));
    };
    match usize::try_from(bytes) {
        Ok(bytes) if bytes <= NBD_OPTION_BYTES_MAX => Ok((number, bytes)),
        _ => Err(Error::with(
            ErrorKind::Invalid,
            format!("an option of {bytes} bytes; at most {NBD_OPTION_BYTES_MAX} are read"),
        )),
    }
}

impl<'a> Handshake<'a> {
    /// The handshake after the client answered the greeting with these flags.
    pub(super) fn begin(offer: Offer<'a>, client_flags: [u8; 4]) -> Result<Self> {
        let known = u32::from(greeting::FIXED_NEWSTYLE | greeting::NO_ZEROES);
        let flags = Fields(&client_flags).u32().unwrap_or(u32::MAX);
        if flags & !known != 0 {
            let message = format!("a client with unknown flags, {flags:#x}");
            return Err(Error::with(ErrorKind::Unsupported, message));
        }
        Ok(Self {
            offer,
            wants_zeroes: flags & u32::from(greeting::NO_ZEROES) == 0,
            structured: false,
            allocation_of: None,
        })
    }

    /// Answers one option.
    pub(super) fn answer(&mut self, number: u32, data: &[u8]) -> (Vec<u8>, Next) {
        match number {
            option::EXPORT_NAME => return self.export_name(data),
            option::GO => {
                let (bytes, name) = self.info(number, data);
                let next = name.map_or(Next::Option, |name| Next::Transmission(self.agreed(name)));
                return (bytes, next);
            }
            option::ABORT => return (reply(number, option_reply::ACK, &[]), Next::End),
            _ => {}
        }
        let bytes = match number {
            option::INFO => self.info(number, data).0,
            option::LIST => self.list(data),
            option::STRUCTURED_REPLY => self.structured_reply(data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(number, data),
            _ => refuse(number, option_reply::ERR_UNSUP, "not supported"),
        };
        (bytes, Next::Option)
    }

    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.offer.name.as_bytes()
    }

    fn agreed(&self, name: &[u8]) -> Agreed {
        Agreed {
            structured: self.structured,
            // What was selected holds for the export that it was selected for.
            allocation: self.allocation_of.as_deref() == Some(name),
        }
    }

    fn transmission_flags(&self) -> u16 {
        let always = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN;
        let changing = if self.offer.is_read_only {
            transmission::READ_ONLY
        } else {
            transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
        };
        let structured = if self.structured {
            transmission::SEND_DF
        } else {
            0
        };
        always | changing | structured
    }

    /// The option that has no reply: what follows it is the export, or the end.
    fn export_name(&self, name: &[u8]) -> (Vec<u8>, Next) {
        if !self.is_ours(name) {
            return (Vec::new(), Next::End);
        }
        let mut message = Message::default().u64(self.offer.bytes);
        message = message.u16(self.transmission_flags());
        if self.wants_zeroes {
            message = message.bytes(&[0; 124]);
        }
        (message.0, Next::Transmission(self.agreed(name)))
    }

    /// Information on the export, and the name it was asked for by, if that was possible.
    fn info<'d>(&self, number: u32, data: &'d [u8]) -> (Vec<u8>, Option<&'d [u8]>) {
        let Some((name, wants_name)) = info_request(data) else {
            return (malformed(number), None);
        };
        if !self.is_ours(name) {
            return (unknown_export(number), None);
        }
        let mut told = vec![
            (Message::default().u16(info::EXPORT))
                .u64(self.offer.bytes)
                .u16(self.transmission_flags()),
            (Message::default().u16(info::BLOCK_SIZE))
                .u32(self.offer.sector_bytes)
                .u32(u32::try_from(BLOCK_BYTES).unwrap_or(u32::MAX))
                .u32(NBD_PAYLOAD_BYTES_MAX),
        ];
        if wants_name {
            told.push((Message::default().u16(info::NAME)).bytes(self.offer.name.as_bytes()));
        }
        let mut bytes = Vec::new();
        for message in told {
            bytes.extend(reply(number, option_reply::INFO, &message.0));
        }
        bytes.extend(reply(number, option_reply::ACK, &[]));
        (bytes, Some(name))
    }

    fn list(&self, data: &[u8]) -> Vec<u8> {
        if !data.is_empty() {
            return malformed(option::LIST);
        }
        let name = string(self.offer.name.as_bytes());
        let mut bytes = reply(option::LIST, option_reply::SERVER, &name);
        bytes.extend(reply(option::LIST, option_reply::ACK, &[]));
        bytes
    }

    fn structured_reply(&mut self, data: &[u8]) -> Vec<u8> {
        if !data.is_empty() {
            return malformed(option::STRUCTURED_REPLY);
        }
        self.structured = true;
        reply(option::STRUCTURED_REPLY, option_reply::ACK, &[])
    }

    /// Lists or selects metadata contexts; a selection replaces the one before, also when it fails.
    fn contexts(&mut self, number: u32, data: &[u8]) -> Vec<u8> {
        let selects = number == option::SET_META_CONTEXT;
        if selects {
            self.allocation_of = None;
        }
        let Some((name, queries)) = context_request(data) else {
            return malformed(number);
        };
        if !self.structured {
            let way_out = "negotiate structured replies first";
            return refuse(number, option_reply::ERR_INVALID, way_out);
        }
        if !self.is_ours(name) {
            return unknown_export(number);
        }
        let is_meant = |query: &&[u8]| -> bool {
            *query == allocation::CONTEXT.as_bytes() || (!selects && *query == b"base:")
        };
        let mut bytes = Vec::new();
        if queries.iter().any(is_meant) || (queries.is_empty() && !selects) {
            let id = if selects { allocation::CONTEXT_ID } else { 0 };
            let context = Message::default().u32(id);
            let context = context.bytes(allocation::CONTEXT.as_bytes()).0;
            bytes.extend(reply(number, option_reply::META_CONTEXT, &context));
            if selects {
                self.allocation_of = Some(name.to_vec());
            }
        }
        bytes.extend(reply(number, option_reply::ACK, &[]));
        bytes
    }
}

/// The data of `INFO` and `GO`: the export's name, and whether its full name is asked for.
fn info_request(data: &[u8]) -> Option<(&[u8], bool)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let mut wants_name = false;
    for _ in 0..fields.u16()? {
        wants_name |= fields.u16()? == info::NAME;
    }
    fields.is_empty().then_some((name, wants_name))
}

/// The data of the options about contexts: the export's name and the queries.
fn context_request(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let mut queries = Vec::new();
    for _ in 0..fields.u32()? {
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}

fn string(text: &[u8]) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    Message::default().u32(length).bytes(text).0
}

fn reply(number: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let message = Message::default().u64(OPTION_REPLY_MAGIC);
    let message = message.u32(number).u32(kind);
    message.bytes(&string(data)).0
}

fn refuse(number: u32, kind: u32, fact: &str) -> Vec<u8> {
    reply(number, kind, fact.as_bytes())
}

fn malformed(number: u32) -> Vec<u8> {
    refuse(number, option_reply::ERR_INVALID, "malformed")
}

fn unknown_export(number: u32) -> Vec<u8> {
    refuse(number, option_reply::ERR_UNKNOWN, "no such export here")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Offer<'_> = Offer {
        name: "p0/v",
        bytes: 1 << 20,
        sector_bytes: 4096,
        is_read_only: false,
    };

    fn begun() -> Handshake<'static> {
        Handshake::begin(OFFER, [0, 0, 0, 3]).unwrap()
    }

    fn asked(name: &[u8], kinds: &[u16]) -> Vec<u8> {
        let mut message = Message::default().bytes(&string(name));
        message = message.u16(u16::try_from(kinds.len()).unwrap());
        for kind in kinds {
            message = message.u16(*kind);
        }
        message.0
    }

    fn selected(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
        let count = u32::try_from(queries.len()).unwrap();
        let mut message = Message::default().bytes(&string(name)).u32(count);
        for query in queries {
            message = message.bytes(&string(query));
        }
        message.0
    }

    /// The kinds of the replies, and the data of each.
    fn replies(mut bytes: &[u8], number: u32) -> Vec<(u32, Vec<u8>)> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let mut fields = Fields(bytes);
            assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
            assert_eq!(fields.u32(), Some(number));
            let kind = fields.u32().unwrap();
            all.push((kind, fields.string().unwrap().to_vec()));
            bytes = fields.0;
        }
        all
    }

    fn kinds(bytes: &[u8], number: u32) -> Vec<u32> {
        let all = replies(bytes, number);
        all.into_iter().map(|(kind, _)| kind).collect()
    }

    #[test]
    fn a_client_with_unknown_flags_is_turned_away() {
        assert!(Handshake::begin(OFFER, [0, 0, 0, 4]).is_err());
        assert!(Handshake::begin(OFFER, [0x80, 0, 0, 3]).is_err());
    }

    #[test]
    fn an_option_is_short_and_has_its_magic() {
        let header = |magic: u64, bytes: u32| {
            let message = Message::default().u64(magic).u32(option::GO).u32(bytes);
            option_header(message.0.try_into().unwrap())
        };
        assert_eq!(header(OPTION_MAGIC, 6).unwrap(), (option::GO, 6));
        assert!(header(OPTION_MAGIC ^ 1, 6).is_err());
        assert!(header(OPTION_MAGIC, u32::MAX).is_err());
    }

    #[test]
    fn an_export_is_found_by_its_name_and_by_none() {
        for name in [&b""[..], b"p0/v"] {
            let (bytes, next) = begun().answer(option::GO, &asked(name, &[info::NAME]));
            assert_eq!(next, Next::Transmission(Agreed::default()));
            let all = replies(&bytes, option::GO);
            assert_eq!(all.last().unwrap().0, option_reply::ACK);
            assert!(all.iter().any(|(_, data)| data == b"\0\x01p0/v"));
        }
        let (bytes, next) = begun().answer(option::GO, &asked(b"p0/w", &[]));
        assert_eq!(next, Next::Option);
        assert_eq!(kinds(&bytes, option::GO), [option_reply::ERR_UNKNOWN]);
        let (bytes, next) = begun().answer(option::EXPORT_NAME, b"p0/w");
        assert_eq!((bytes.len(), next), (0, Next::End));
    }

    #[test]
    fn the_old_way_in_has_its_zeroes_unless_they_are_not_wanted() {
        let (bytes, _) = begun().answer(option::EXPORT_NAME, b"");
        assert_eq!(bytes.len(), 10);
        let mut wants_zeroes = Handshake::begin(OFFER, [0, 0, 0, 1]).unwrap();
        let (bytes, next) = wants_zeroes.answer(option::EXPORT_NAME, b"p0/v");
        assert_eq!(bytes.len(), 134);
        assert_eq!(next, Next::Transmission(Agreed::default()));
    }

    #[test]
    fn what_an_export_can_do_depends_on_what_it_is() {
        let flags = |handshake: &Handshake<'_>| handshake.transmission_flags();
        let mut handshake = begun();
        assert_eq!(flags(&handshake) & transmission::SEND_DF, 0);
        handshake.answer(option::STRUCTURED_REPLY, &[]);
        assert_ne!(flags(&handshake) & transmission::SEND_DF, 0);
        assert_ne!(flags(&handshake) & transmission::SEND_TRIM, 0);
        let offer = Offer {
            is_read_only: true,
            ..OFFER
        };
        let snapshot = Handshake::begin(offer, [0; 4]).unwrap();
        assert_ne!(flags(&snapshot) & transmission::READ_ONLY, 0);
        assert_eq!(flags(&snapshot) & transmission::SEND_TRIM, 0);
    }

    #[test]
    fn contexts_need_structured_replies_and_the_export() {
        let mut handshake = begun();
        let number = option::SET_META_CONTEXT;
        let wanted = selected(b"p0/v", &[b"qemu:x", b"base:allocation"]);
        let (bytes, _) = handshake.answer(number, &wanted);
        assert_eq!(kinds(&bytes, number), [option_reply::ERR_INVALID]);
        handshake.answer(option::STRUCTURED_REPLY, &[]);
        let (bytes, _) = handshake.answer(number, &selected(b"other", &[b"base:allocation"]));
        assert_eq!(kinds(&bytes, number), [option_reply::ERR_UNKNOWN]);
        let (bytes, _) = handshake.answer(number, &wanted);
        let chosen = [option_reply::META_CONTEXT, option_reply::ACK];
        assert_eq!(kinds(&bytes, number), chosen);
        let agreed = |handshake: &mut Handshake<'_>, name| match handshake
            .answer(option::GO, &asked(name, &[]))
            .1
        {
            Next::Transmission(agreed) => agreed.allocation,
            Next::Option | Next::End => panic!(),
        };
        assert!(agreed(&mut handshake, b"p0/v"));
        // Selected for the one name, not for the other.
        assert!(!agreed(&mut handshake, b""));
        // A later selection replaces it, even if it selects nothing.
        handshake.answer(number, &selected(b"p0/v", &[b"base:"]));
        assert!(!agreed(&mut handshake, b"p0/v"));
        let number = option::LIST_META_CONTEXT;
        for queries in [&[][..], &[&b"base:"[..]]] {
            let (bytes, _) = handshake.answer(number, &selected(b"", queries));
            assert_eq!(kinds(&bytes, number), chosen);
        }
    }

    #[test]
    fn tls_and_the_unknown_are_refused_and_the_handshake_goes_on() {
        for number in [4, 5, 11, 12, u32::MAX] {
            let (bytes, next) = begun().answer(number, b"anything");
            assert_eq!(kinds(&bytes, number), [option_reply::ERR_UNSUP]);
            assert_eq!(next, Next::Option);
        }
        let (bytes, next) = begun().answer(option::ABORT, b"");
        assert_eq!(kinds(&bytes, option::ABORT), [option_reply::ACK]);
        assert_eq!(next, Next::End);
    }

    #[test]
    fn hostile_data_is_malformed_and_answered_shortly() {
        let mut random = 1_u64;
        let whole = [
            asked(b"p0/v", &[info::NAME, info::EXPORT]),
            selected(b"p0/v", &[b"base:allocation"]),
        ];
        for number in [option::INFO, option::GO, 9, 10] {
            for whole in &whole {
                for length in 0..whole.len() {
                    let mut data = whole[..length].to_vec();
                    let (bytes, next) = begun().answer(number, &data);
                    let answered = kinds(&bytes, number);
                    // Cut short, no data is what the option takes; for the other's data only the name fits.
                    if !matches!(next, Next::Transmission(_)) && answered.len() == 1 {
                        assert!(
                            [option_reply::ERR_INVALID, option_reply::ACK].contains(&answered[0])
                        );
                    }
                    for byte in &mut data {
                        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                        *byte ^= (random >> 60) as u8;
                    }
                    assert!(begun().answer(number, &data).0.len() < 1000);
                }
            }
        }
        let (bytes, _) = begun().answer(option::LIST, b"x");
        assert_eq!(kinds(&bytes, option::LIST), [option_reply::ERR_INVALID]);
    }
}
