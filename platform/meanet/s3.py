"""S3: a file system that outwaits an outage, and a preflight that says what is missing before an hour of training.

Where and who: the usual variables AWS_ENDPOINT_URL (any server that speaks S3), AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE. They are read here and handed on to the libraries that have names of their own.
"""

import contextlib
import email.utils
import os
import re
import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pyarrow import fs

from meanet.errors import UserError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

SCHEME = "s3://"
_ATTEMPTS = 9
"""Of a request, with growing pauses between: about a minute in all."""
_SKEW_S = 300
"""Above 15 minutes S3 refuses signatures; a clock that is a third of that off is worth a word."""


def endpoint() -> str | None:
    """The server's URL, scheme://host or scheme://host:port; None = Amazon's.

    Raises:
        UserError: it is none; credentials in it are not repeated.
    """
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if text := os.environ.get(name):
            if wrong := _defect(text):
                shown = re.split(r"[?#]", text.rpartition("@")[2])[0]
                raise UserError(
                    f"{name} {'(...@)' if '@' in text else ''}{shown} {wrong}: set it to http://host:port or "
                    "https://host"
                )
            return text.rstrip("/")
    return None


def _defect(url: str) -> str | None:
    """What keeps a text from being a server's URL; None if nothing does."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "has no host and port that can be read"
    if "@" in url:
        return "has credentials in it, which belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if parts.scheme not in ("http", "https") or "://" not in url:
        return "does not begin with http:// or https://"
    if not host or re.search(r"\s", url):
        return "names no host"
    if parts.path.strip("/") or "?" in url or "#" in url:
        return "has more than a host and a port"
    return None


def region() -> str:
    """Of the bucket; other servers take any."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def hand_on_endpoint() -> None:
    """Tell MLflow and the AWS libraries what AWS_ENDPOINT_URL says; call once, before they are used."""
    url = endpoint()
    if url:
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", url)
        os.environ.setdefault("AWS_REGION", region())
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


class PatientS3(fs.S3FileSystem):  # type: ignore[misc]
    """S3 as pyarrow has it, whose patience survives pickling (pyarrow forgets a retry strategy then)."""

    def __init__(self) -> None:
        url = urlsplit(endpoint() or "")
        where = {"endpoint_override": url.netloc, "scheme": url.scheme} if url.netloc else {}
        super().__init__(
            region=region(),
            connect_timeout=5,
            request_timeout=60,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            **where,
        )

    def __reduce__(self) -> Any:
        """Made anew from the other process's variables: no credential travels."""
        return PatientS3, ()


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key.

    Raises:
        UserError: it names no bucket.
    """
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not bucket:
        raise UserError(f"{uri} names no bucket: give s3://bucket/key")
    return bucket, key.strip("/")


def preflight(uri: str, *, write: bool = False) -> None:
    """See to it that a bucket can be used: server, credentials, clock, bucket, permission, in this order.

    Args:
        uri: s3://bucket/key of what is to be read, or the folder below which is to be written.
        write: whether objects must be written and removed there, in one part and in several.

    Raises:
        UserError: what is missing, and what to do.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    bucket, key = split(uri)
    patience = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
    try:
        client = boto3.session.Session().client("s3", endpoint_url=endpoint(), region_name=region(), config=patience)
        _check_clock(client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1), uri)
        if write:
            _try_writing(client, bucket, key)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(
            f"{uri}: there are no credentials ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        ) from error
    except ClientError as error:
        raise UserError(f"{uri}: {_says(error.response, bucket, write=write)}") from error
    except BotoCoreError as error:
        where = endpoint() or "Amazon S3"
        raise UserError(
            f"{uri}: {where} does not answer ({error}): start it, or correct AWS_ENDPOINT_URL and AWS_REGION"
        ) from error


def abort_uploads(uri: str) -> list[str]:
    """Give up uploads in parts that were begun below s3://bucket/key and never ended: nobody sees them, and they cost
    what they hold. Where that is not allowed, or the server does not answer, they stay.

    Returns:
        The keys of those that are gone.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split(uri)
    gone: list[str] = []
    with contextlib.suppress(BotoCoreError, ClientError):
        client = boto3.session.Session().client("s3", endpoint_url=endpoint(), region_name=region())
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{key}/"):
            for upload in page.get("Uploads", ()):
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                gone.append(upload["Key"])
    return gone


def _says(response: Any, bucket: str, *, write: bool) -> str:
    """What an error's code means to a user."""
    code = str(response.get("Error", {}).get("Code", ""))
    message = response.get("Error", {}).get("Message", "")
    doing = "written" if write else "read"
    known = {
        "NoSuchBucket": f"there is no bucket {bucket!r}: create it, or correct the name",
        "404": f"there is no bucket {bucket!r}: create it, or correct the name",
        "InvalidAccessKeyId": "the server does not know the key of AWS_ACCESS_KEY_ID: correct it",
        "SignatureDoesNotMatch": "the secret does not fit the key: correct AWS_SECRET_ACCESS_KEY",
        "ExpiredToken": "the session's credentials have expired: get new ones",
        "AccessDenied": f"these credentials may not have the bucket {bucket!r} {doing}: ask for the permission",
        "403": f"these credentials may not have the bucket {bucket!r} {doing}: ask for the permission",
        "RequestTimeTooSkewed": "this machine's clock differs too much from the server's: set it (NTP)",
        "PermanentRedirect": f"the bucket {bucket!r} is in another region than {region()!r}: set AWS_REGION",
        "AuthorizationHeaderMalformed": f"the bucket {bucket!r} is in another region than {region()!r}: set AWS_REGION",
    }
    return known.get(code, f"it cannot be {doing} ({code}: {message})")


def _check_clock(answer: Any, uri: str) -> None:
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if not date:
        return
    off = (datetime.now(UTC) - email.utils.parsedate_to_datetime(date)).total_seconds()
    if abs(off) > _SKEW_S:
        raise UserError(
            f"{uri}: this machine's clock is {off:+.0f} s off the server's, and signatures are refused beyond 900: "
            "set it (NTP)"
        )


def _try_writing(client: "S3Client", bucket: str, key: str) -> None:
    """One object in one request, and one that is begun in parts and given up."""
    name = "/".join(part for part in (key, f".preflight-{secrets.token_hex(4)}") if part)
    client.put_object(Bucket=bucket, Key=name, Body=f"{time.time()}".encode())
    client.delete_object(Bucket=bucket, Key=name)
    upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
    client.abort_multipart_upload(Bucket=bucket, Key=name, UploadId=upload)
