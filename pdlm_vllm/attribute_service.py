"""Attributes for HTTP requests: the questions of all prompts of an image side by side, through the engine."""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

from pdlm_hf.attributes import AttributeSchema
from pdlm_hf.attributes.captions import AttributeCaption, attribute_caption

from .attributes import AttributeWork
from .service import Service, Tally, gave_up

AT_A_TIME = 8  # engine requests of an HTTP request: each carries the tensors of its image


async def read_attributes(
    service: Service, works: list[AttributeWork], schema: AttributeSchema, name: str, **options: Any
) -> tuple[list[AttributeCaption], dict[str, Any]]:
    """The attributes of regions in input order, and the usage.

    Args:
        service (`Service`)
        works (`list[AttributeWork]`): of the service's `attribute_works`.
        schema (`AttributeSchema`)
        name (`str`): of the HTTP request.
        **options: of vLLM's `AsyncLLM.generate`.
    """
    places = asyncio.Semaphore(AT_A_TIME)

    async def ask(work: AttributeWork, own: str, params) -> dict[str, Any]:
        async with places:
            service.log_input(own, work.prompt.prompt, params, **options)
            *_, output = [one async for one in service.generate(work.prompt.prompt, params, own, **options)]
        report = (output.kv_transfer_params or {}).get("pdlm")
        if report is None:
            raise gave_up(output)
        return report

    async def follow(number: int, work: AttributeWork) -> None:
        while work.parts:
            first = work.requests - len(work.parts)
            asked = (ask(work, f"{name}-{number}-{first + k}", params) for k, params in enumerate(work.params))
            await service.aside(partial(work.tell, await _together(*asked)))

    await _together(*(follow(number, work) for number, work in enumerate(works)))
    captions = await service.aside(partial(_captions, service, works, schema))
    tally = Tally(service.labels)
    for work in works:
        tally.add_attributes(work)
    service.log_captions(name, captions, stream=False)
    return captions, tally.usage()


def _captions(service: Service, works: list[AttributeWork], schema: AttributeSchema) -> list[AttributeCaption]:
    found: dict[int, AttributeCaption] = {}
    for work in works:
        attributes = work.attributes(schema, service.processor)
        found |= {k: attribute_caption(schema, region) for k, region in attributes.items()}
    return [found[k] for k in sorted(found)]


async def _together(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Results of all of them; if one fails, or nobody waits any more, the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
